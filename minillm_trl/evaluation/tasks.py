"""Names of evaluation tasks: what they stand for, and the folder that each has in the results."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files.messages import nearest

# All but E2E, which ships with the package, are written by `minillm-trl prepare-data` into a folder of their name
NAMED_TASKS = ("dolly", "selfinst", "vicuna", "sni", "unni", "e2e")


def find_tasks(words: Sequence[str], data_dir: Path) -> dict[str, str]:
    """The datasets that words of a command line stand for, by the name of the task.

    Args:
        words (`Sequence[str]`): each `NAME=DATASET`, one of [`NAMED_TASKS`] or several with commas between them, a
            file or folder, or `OWNER/NAME` for a dataset on the hub. A file without a name is called by its stem.
        data_dir (`Path`): holds the folders of the named tasks.

    Raises:
        ValueError: for a word that is none of these, a named task that is not prepared, and two tasks of one name.
    """
    tasks: dict[str, str] = {}
    for word in words:
        for name, dataset in _datasets(word, data_dir):
            if name in tasks:
                raise UserError(f"--tasks names {name!r} twice. Give each a name of its own with NAME=DATASET.")
            tasks[name] = dataset
    return tasks


def _datasets(word: str, data_dir: Path) -> list[tuple[str, str]]:
    name, equals, dataset = word.partition("=")
    if equals and not Path(word).exists():
        if not (name and dataset) or Path(name).name != name:
            raise UserError(f"--tasks {word}: expected NAME=DATASET with a name for a folder.")
        return [(name, dataset)]
    names = word.split(",")
    if all(each in NAMED_TASKS for each in names):
        return [(each, _prepared(each, data_dir)) for each in names]
    path = Path(word).expanduser()
    if path.exists():
        return [(path.name.split(".")[0], word)]
    if "/" in word and "," not in word and not path.suffix:
        return [(path.name, word)]
    unknown = next((each for each in names if each not in NAMED_TASKS), word)
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
        f"--tasks {name}: {folder} is not there. Make it with `minillm-trl prepare-data --task {name} --output_dir "
        f"{folder}` (--source names your copy), or name the folder that holds it with --data_dir."
    )
