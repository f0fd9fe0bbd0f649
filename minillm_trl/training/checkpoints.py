"""Folders of checkpoints: a record of a checkpoint's files, by which a torn or damaged one is known."""

import json
import logging
import os
from pathlib import Path
from typing import Any, TypedDict

import xxhash

from ..errors import FileError
from ..files.json_files import read_json

logger = logging.getLogger(__name__)

RECORD = "files.json"
STATE = "trainer_state.json"
UNFINISHED = "unfinished"  # folder of a run: what is written there has no final name yet
_REPLACED = ".replaced"
_BLOCK = 1 << 20


class _File(TypedDict):
    bytes: int
    xxh3_128: str


class CheckpointError(FileError):
    """A checkpoint that could not be written, or is not as it was written."""


def record_files(folder: Path) -> None:
    """Write down size and checksum of every file of a checkpoint, once all of them are there."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
    (folder / RECORD).write_text(json.dumps(files, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, if anything is.

    Args:
        checkpoint (`Path`): its folder.
        checksums (`bool`, *optional*, defaults to `True`): whether to read all files; otherwise a file counts as whole
            if it has its size. Checkpoints that were written without a record have neither, and are only known to be
            whole by the trainer's state, which is written last.
    """
    if not (checkpoint / STATE).is_file():
        return f"it has no {STATE}, which is written last"
    mend = "Resume from an earlier checkpoint."
    try:
        read_json(checkpoint / STATE, dict[str, Any], mend)
        record = checkpoint / RECORD
        files = read_json(record, dict[str, _File], mend) if record.exists() else {}
    except (OSError, ValueError) as error:
        return str(error)
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes and not {expected['bytes']}"
        if checksums and _checksum(path) != expected["xxh3_128"]:
            return f"{name} is not as it was written (its checksum differs)"
    return None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds an optimizer's state, in the form of torch, FSDP or DeepSpeed."""
    return any(any(checkpoint.glob(pattern)) for pattern in ("optimizer*", "rank*-optimizer*", "global_step*"))


def newest_whole_checkpoint(folder: Path, *, checksums: bool = False) -> str | None:
    """The newest `checkpoint-N` in a run's folder with nothing wrong, if there is one; damaged ones are warned of."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=_number, reverse=True):
        damage = find_damage(path, checksums=checksums)
        if damage is None:
            return str(path)
        logger.warning(f"{path} is damaged: {damage}. It is passed over.")
    return None


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its final name; a folder of that name goes first.

    A crash between the two renames leaves both folders beside `source`, see [`finish_replacements`].
    """
    if target.exists():  # one that was damaged, or a later one than the run was taken back to
        os.rename(target, source.with_name(source.name + _REPLACED))
    os.rename(source, target)


def finish_replacements(run: Path) -> None:
    """Finish what a crash has interrupted between the two renames of [`replace_folder`].

    The new checkpoint gets its name, or, if it is damaged, the one that it was to replace gets its name back. Without
    this step both would be removed with the rest of the unfinished folder. Several processes may call it at once.
    """
    for replaced in sorted((run / UNFINISHED).glob(f"checkpoint-*{_REPLACED}")):
        new = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        target = run / new.name
        if target.exists():
            continue
        damage = find_damage(new) if (new / RECORD).exists() else None  # a node's own part has no record
        try:
            os.rename(new if new.is_dir() and damage is None else replaced, target)
        except FileNotFoundError:
            if not target.exists():  # otherwise another process was faster
                raise
        logger.warning(f"{target} was being replaced when the run ended: the replacement is finished.")


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
