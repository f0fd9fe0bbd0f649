"""Resolve the names of evaluation tasks to datasets."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files.messages import nearest

# E2E ships with the package; `minillm-trl prepare-data` writes the others into folders with these names
NAMED_TASKS = ("dolly", "selfinst", "vicuna", "sni", "unni", "e2e")


def find_tasks(words: Sequence[str], data_dir: Path) -> dict[str, str]:
    """Return the datasets named by the values of `--tasks`, by task name.

    Args:
        words (`Sequence[str]`): `NAME=DATASET`, one or more of [`NAMED_TASKS`] separated by commas, a file or folder,
            or `OWNER/NAME` for a dataset on the hub. Without `NAME=`, the task has the stem of the file as its name.
        data_dir (`Path`): folder with the folders of the named tasks.

    Raises:
        ValueError: if a value is none of these, a named task is not prepared, or two tasks have the same name.
    """
    tasks: dict[str, str] = {}
    for word in words:
        for name, dataset in _datasets(word, data_dir):
            if name in tasks:
                raise UserError(f"--tasks names {name!r} twice. Choose different names with NAME=DATASET.")
            tasks[name] = dataset
    return tasks


def _datasets(word: str, data_dir: Path) -> list[tuple[str, str]]:
    name, equals, dataset = word.partition("=")
    if equals and not Path(word).exists():
        if not (name and dataset) or Path(name).name != name:
            raise UserError(f"--tasks {word}: expected NAME=DATASET, where NAME is a valid folder name.")
        return [(name, dataset)]
    names = word.split(",")
    if all(task in NAMED_TASKS for task in names):
        return [(task, _prepared(task, data_dir)) for task in names]
    path = Path(word).expanduser()
    if path.exists():
        return [(path.name.split(".")[0], word)]
    if "/" in word and "," not in word and not path.suffix:
        return [(path.name, word)]
    unknown = next((task for task in names if task not in NAMED_TASKS), word)
    if path.suffix or "/" in unknown:
        raise UserError(f"--tasks {unknown}: no such file.")
    raise UserError(
        f"--tasks {unknown}: no such task, file or folder. Tasks: {', '.join(NAMED_TASKS)}."
        f"{nearest(unknown, NAMED_TASKS)}"
    )


def _prepared(name: str, data_dir: Path) -> str:
    folder = data_dir / name
    if name == "e2e" or folder.is_dir():
        return name if name == "e2e" else str(folder)
    raise UserError(
        f"--tasks {name}: {folder} does not exist. Create it with `minillm-trl prepare-data --task {name} "
        f"--output_dir {folder}` (with --source for a local copy), or name its parent folder with --data_dir."
    )
