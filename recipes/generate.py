"""Write the YAMLs of the paper's recipes, `recipes/*-from-*/*.yaml`.

    python recipes/generate.py

`pairs.yaml` has what differs between the pairs; `templates` has a file per stage. Templates whose names begin with an
underscore are parts that several stages share.
"""

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

RECIPES = Path(__file__).parent
_NOTE = "# Generated from templates/{stage} and pairs.yaml by recipes/generate.py: edit those\n"


def make_files() -> dict[Path, str]:
    """Return the text of each generated YAML, by its path below `recipes`.

    Raises:
        ValueError: if the batches of a pair's GPUs do not add up to an optimizer step.
    """
    templates = Environment(
        loader=FileSystemLoader(RECIPES / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pairs: dict[str, dict[str, Any]] = yaml.safe_load((RECIPES / "pairs.yaml").read_text())
    stages = [name for name in templates.list_templates() if not name.startswith("_")]
    files = {}
    for folder, pair in pairs.items():
        values = {
            **pair,
            "folder": folder,
            "launch": f"--accelerate_config v100_{pair['strategy']}_fp16 --num_processes {pair['gpus']}",
            "accumulation_steps": partial(_accumulation_steps, folder, pair["gpus"]),
        }
        for stage in stages:
            text = templates.get_template(stage).render(values)
            files[Path(folder, stage.removesuffix(".jinja"))] = f"{_NOTE.format(stage=stage)}{text}"
    return files


def _accumulation_steps(folder: str, gpus: int, batch: int, mini_batch: int) -> int:
    steps, rest = divmod(mini_batch, batch * gpus)
    if rest:
        raise ValueError(
            f"{folder}: an optimizer step of {mini_batch} rows is no multiple of {batch * gpus}, which is batch "
            f"{batch} x {gpus} gpus. Change batch, gpus or mini_batch in pairs.yaml."
        )
    return steps


def main() -> None:
    for path, text in make_files().items():
        file = RECIPES / path
        if not file.is_file() or file.read_text() != text:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            print(f"recipes/{path}")


if __name__ == "__main__":
    main()
