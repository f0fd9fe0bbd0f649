"""Result folders of evaluation tasks: check whether a task is done, and write its results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from ..errors import UserError
from ..files.json_files import read_json
from ..files.messages import shortened
from ..files.whole_files import make_folder, write_whole


class _Done(TypedDict):
    settings: dict[str, Any]


def weight_files(names: Iterable[str | None]) -> list[Path]:
    """Return the weight files in the local folders among `names` (of models and adapters)."""
    folders = [Path(name) for name in names if name is not None]
    return [path for folder in folders for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]


def is_done(folder: Path, settings: dict[str, Any], files: Iterable[Path]) -> bool:
    """Return whether the folder holds the results of these settings.

    Args:
        folder (`Path`): folder of the task.
        settings (`dict`): all settings that the results depend on.
        files (`Iterable[Path]`): local files that the results depend on.

    Raises:
        ValueError: if it holds results of other settings, or results older than one of the files.
    """
    path = folder / "results.json"
    if not path.is_file():
        return False
    found = read_json(path, _Done, "Delete this folder, or name another with --output_dir.")["settings"]
    problems = [
        f"results of {name}={shortened(found.get(name), 200)}, now {shortened(value, 200)}"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    problems += [
        f"results that are older than {file}" for file in files if file.stat().st_mtime_ns > path.stat().st_mtime_ns
    ]
    if problems:
        raise UserError(f"{folder} holds {problems[0]}. Delete this folder, or name another with --output_dir.")
    from accelerate import PartialState  # imports torch, which takes seconds

    PartialState().print(f"{folder}: done before")
    return True


def write_results(folder: Path, results: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
    """Write `samples.jsonl`, one line per sample, then `results.json`, which marks the task as done."""
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    make_folder(folder)
    for name, text in (("samples.jsonl", lines), ("results.json", json.dumps(results, indent=1))):
        write_whole(folder / name, text)
