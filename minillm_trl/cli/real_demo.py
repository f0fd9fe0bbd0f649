"""`minillm-trl demo --models smollm2`: the recipe of a real pair of models, from the teacher to ten answers."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.whole_files import make_folder
from . import recipe
from .launch import recipes_folder
from .stages import read_recipe

RECIPE = "smollm2-92m"
ANSWERS = 10
_SHOWN = {"teacher": "teacher", "heal": "healed student", "minillm": "MiniLLM student"}


def run_real_demo(folder: Path, teacher: str | None, dolly: Path | None) -> int:
    """Run the recipe in `folder`, resuming an interrupted run, and print answers of teacher, start and student.

    Args:
        folder (`Path`): working directory of the recipe, which writes to `data` and `runs` in it.
        teacher (`str`, *optional*): name or folder of SmolLM2-135M-Instruct or of a model with as many layers and a
            chat template; by default it comes from the hub.
        dolly (`Path`, *optional*): a copy of databricks-dolly-15k.jsonl; by default it comes from the hub.

    Returns:
        `int`: exit status of the recipe.

    Raises:
        ValueError: if `dolly` is not a file, or the folder holds a run with another teacher or other data.
    """
    if dolly is not None and not dolly.is_file():
        raise UserError(f"--dolly {dolly}: no such file. Name a copy of databricks-dolly-15k.jsonl.")
    if teacher is not None and Path(teacher).is_dir():
        teacher = str(Path(teacher).resolve())
    dolly = dolly and dolly.resolve()
    stages = recipes_folder(RECIPE)
    make_folder(folder)
    with contextlib.chdir(folder):
        print(f"Run folder: {Path.cwd()}")
        if teacher is not None:
            _run_stage(stages, "teacher", "shrink", ["--model", teacher])
        if dolly is not None:
            _run_stage(stages, "dolly", "prepare-data", ["--source", str(dolly)])
        status = recipe.run([str(stages)])
        if status == 0:
            print(_answers(Path("runs/smollm2/evaluation")))
    return status


def _run_stage(folder: Path, name: str, subcommand: str, words: Sequence[str]) -> None:
    """Run a stage with a source of its own, and accept the result as the recipe's.

    The subcommand leaves a finished result as it is, and refuses one that was made from another source.
    """
    if recipe.run_subcommand(subcommand, ["--config", str(folder / f"{name}.yaml"), *words]) != 0:
        raise UserError(
            f"stage {name} failed, see the lines above. If {Path.cwd()} has a run with another teacher or other data, "
            "name another --output_dir."
        )
    whole = read_recipe(folder)
    (stage,) = whole.named([name])
    if not stage.is_accepted:
        stage.mark(whole.inputs(stage), finished=True, accepted=True)


def _answers(evaluation: Path) -> str:
    """Return the greedy answers of the models to the first test prompts."""
    samples = {name: _read_samples(evaluation / name) for name in _SHOWN}
    blocks = []
    for row, sample in enumerate(samples["teacher"][:ANSWERS]):
        lines = [f"\n{row + 1}. {sample['prompt'][-1]['content']}"]
        lines += [f"   {label}: {_one_line(samples[name][row]['outputs'][0])}" for name, label in _SHOWN.items()]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _read_samples(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("**/greedy/samples.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _one_line(text: str) -> str:
    return " ".join(text.split())
