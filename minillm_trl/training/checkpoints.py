"""Checkpoint folders: a record of sizes and checksums detects incomplete and damaged checkpoints."""

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
UNFINISHED = "unfinished"  # folder inside a run; files are written here before they get their final name
_REPLACED = ".replaced"
_BLOCK = 1 << 20


class _File(TypedDict):
    bytes: int
    xxh3_128: str


class CheckpointError(FileError):
    """A checkpoint could not be written, or has been damaged since."""


def record_files(folder: Path) -> None:
    """Record the size and checksum of every file of a complete checkpoint."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
    (folder / RECORD).write_text(json.dumps(files, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path, *, checksums: bool = True) -> str | None:
    """Return a description of the damage to a checkpoint's files; None if there is none.

    Args:
        checkpoint (`Path`): its folder.
        checksums (`bool`, *optional*, defaults to `True`): whether to read all files, instead of comparing only their
            sizes. In a checkpoint without a record, only the trainer's state is checked, which is written last.
    """
    if not (checkpoint / STATE).is_file():
        return f"it has no {STATE}, which is written last"
    remedy = "Resume from an earlier checkpoint."
    try:
        read_json(checkpoint / STATE, dict[str, Any], remedy)
        record = checkpoint / RECORD
        files = read_json(record, dict[str, _File], remedy) if record.exists() else {}
    except (OSError, ValueError) as error:
        return str(error)
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if checksums and _checksum(path) != expected["xxh3_128"]:
            return f"{name} has changed since it was written (its checksum differs)"
    return None


def has_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds an optimizer state, as saved by torch, FSDP or DeepSpeed."""
    return any(any(checkpoint.glob(pattern)) for pattern in ("optimizer*", "rank*-optimizer*", "global_step*"))


def newest_whole_checkpoint(folder: Path, *, checksums: bool = False) -> str | None:
    """Return the newest undamaged `checkpoint-N` in a run's folder, if any, and warn about damaged ones."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=_number, reverse=True):
        damage = find_damage(path, checksums=checksums)
        if damage is None:
            return str(path)
        logger.warning(f"{path} is damaged: {damage}. Skipping it.")
    return None


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its final name, replacing any folder of that name.

    A crash between the two renames leaves both folders next to `source`, see [`finish_replacements`].
    """
    if target.exists():  # a damaged checkpoint, or one from before the run was resumed at an earlier step
        os.rename(target, source.with_name(source.name + _REPLACED))
    os.rename(source, target)


def finish_replacements(run: Path) -> None:
    """Finish a replacement that a crash interrupted between the two renames of [`replace_folder`].

    The new checkpoint gets its name; if it is damaged, the old checkpoint gets its name back. Without this step, both
    would be removed with the rest of the unfinished folder. Several processes may call this function at once.
    """
    for replaced in sorted((run / UNFINISHED).glob(f"checkpoint-*{_REPLACED}")):
        new = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        target = run / new.name
        if target.exists():
            continue
        damage = (
            find_damage(new) if (new / RECORD).exists() else None
        )  # the part that another node wrote has no record
        try:
            os.rename(new if new.is_dir() and damage is None else replaced, target)
        except FileNotFoundError:
            if not target.exists():  # if it exists, another process was faster
                raise
        logger.warning(f"{target} was being replaced when the run ended; finished the replacement.")


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
