"""The record of a training run, `run.json`, and the recipe to repeat it, `run.yaml`, in the output folder."""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from traceback import format_exception
from typing import Any, Self, TypedDict

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.hub import cached_file, extract_commit_hash

from .. import __version__
from ..errors import UserError
from ..files.json_files import read_json
from ..files.redaction import redact, redact_command
from ..files.whole_files import make_folder, write_whole
from ..hardware.machine import probe
from ..models.fingerprints import model_fingerprint
from .run_settings import plain

RECORD, RECIPE = "run.json", "run.yaml"


class RunRecord(TrainerCallback):
    """Record the inputs and the outcome of a training run in its output folder, on the main process only.

    Use it both as a context manager around the training and as a callback of its trainer. Each attempt at the run,
    resumed or not, is appended to `run.json`; `run.yaml` is the recipe of the last attempt. Both files are written
    atomically.

    Args:
        subcommand (`str`): subcommand of `minillm-trl`.
        argv (`Sequence[str]`): its arguments.
        recipe (`Mapping`): options of the recipe, with the values that the user gave.
        configuration (`Sequence`): the dataclasses built from the options, including the training arguments.
        checkpoint (`str` or `bool`, *optional*): checkpoint to resume from; True for the newest one, if any.

    Raises:
        ValueError: if the folder has a `run.json` that is not such a record.
    """

    def __init__(
        self,
        subcommand: str,
        argv: Sequence[str],
        recipe: Mapping[str, Any],
        configuration: Sequence[Any],
        checkpoint: str | bool | None,
    ):
        (args,) = (part for part in configuration if isinstance(part, TrainingArguments))
        assert args.output_dir is not None  # set by TrainingArguments
        self._writes = PartialState().is_main_process
        self._folder = Path(args.output_dir)
        self._recipe = plain({**recipe, "fp16": args.fp16, "bf16": args.bf16})  # as chosen for this machine
        self._subcommand = subcommand
        self._clock = time.perf_counter()
        self._started = self._clock
        self._clocks: dict[str, Callable[[], float]] = {}
        self._attempts = _earlier_attempts(self._folder / RECORD)
        self.attempt: dict[str, Any] = {
            "command": ["minillm-trl", subcommand, *redact_command(argv)],
            "status": "running",
            "started": _now(),
            "ended": None,
            "resumed_from": checkpoint,
            "steps": None,
            "seconds": {},
            "seeds": {entry.name: getattr(args, entry.name) for entry in fields(args) if entry.name.endswith("seed")},
            "data": {},
            "models": {},
            "configuration": {type(part).__name__: plain(part) for part in configuration},
            **environment(),
        }

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            try:
                PartialState().wait_for_everyone()  # if another process failed, the run has not finished
            except BaseException as failure:
                self._end(failure)
                raise
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self.attempt["status"] = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            self.attempt["error"] = f"{type(error).__name__}: {error}"
        elif self.attempt["status"] == "running":
            self.attempt["status"] = "finished"
        if isinstance(error, Exception) and not isinstance(
            error, UserError
        ):  # its message is complete without a traceback
            self.attempt["traceback"] = "".join(format_exception(error))
        self.attempt["ended"] = _now()
        self._write()

    def stop(self, reason: str) -> None:
        """Record why the training stopped early."""
        self.attempt |= {"status": "stopped", "error": reason}

    def add_data(self, role: str, source: str, dataset: Dataset | IterableDataset | None) -> None:
        """Record a dataset: its rows and a digest that is the same on any machine, or None for a stream."""
        if self._writes and dataset is not None:
            is_stream = isinstance(dataset, IterableDataset)
            self.attempt["data"][role] = {
                "source": source,
                "columns": dataset.column_names,
                "rows": None if is_stream else len(dataset),
                "sha256": None if is_stream else dataset_digest(dataset),
            }

    def add_model(self, role: str, name: str, revision: str | None = None) -> None:
        """Record a model: the digest of a folder, or the commit of a name on the hub."""
        if self._writes:
            fingerprint = model_fingerprint(Path(name))
            commit = _hub_commit(name, revision) if fingerprint is None else None
            self.attempt["models"][role] = {
                "name": name,
                "revision": revision,
                "commit": commit,
                "fingerprint": fingerprint,
            }

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the seconds recorded under this name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add_seconds(name, time.perf_counter() - start)

    def add_clock(self, name: str, seconds: Callable[[], float]) -> None:
        """Read the seconds of this name from a function whenever the record is written."""
        self._clocks[name] = seconds

    def _add_seconds(self, name: str, seconds: float) -> None:
        self.attempt["seconds"][name] = self.attempt["seconds"].get(name, 0.0) + seconds

    def _lap(self) -> float:
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    # Callback

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.attempt["resumed_from"] is True:
            newest = self._folder / f"checkpoint-{state.global_step}"
            self.attempt["resumed_from"] = str(newest) if state.global_step else None
        self._lap()
        self._write()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._lap()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._add_seconds("training", self._lap())
        self.attempt["steps"] = state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._add_seconds("evaluation", self._lap())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._add_seconds("saving", self._lap())
        self._write()  # a killed run leaves this record

    def _write(self) -> None:
        if not self._writes:
            return
        clocks = {name: seconds() for name, seconds in self._clocks.items()}
        self.attempt["seconds"] |= clocks | {"total": time.perf_counter() - self._started}
        make_folder(self._folder)
        record = {"subcommand": self._subcommand, "attempts": [*self._attempts, redact(self.attempt)]}
        write_whole(self._folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        head = f"# minillm-trl {self._subcommand} --config {RECIPE} --output_dir ANOTHER_FOLDER\n"
        recipe = yaml.safe_dump(redact(self._recipe), sort_keys=False, allow_unicode=True)
        write_whole(self._folder / RECIPE, head + recipe)


def dataset_digest(dataset: Dataset) -> str:
    """Return the SHA-256 of all rows."""
    digest = hashlib.sha256()
    for rows in dataset.iter(batch_size=1000):
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return versions, source revision, machine and processes."""
    machine, state = asdict(probe()), PartialState()
    versions = {name: found for name, found in machine.pop("versions").items() if found is not None}
    more = {name: version(name) for name in ("tokenizers", "safetensors", "numpy")}
    return {
        "versions": {"minillm-trl": __version__, "python": platform.python_version(), **versions, **more},
        "source": _commit(Path(__file__).parent),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), **machine},
        "processes": {"number": state.num_processes, "distributed_type": state.distributed_type.value},
    }


def _commit(package: Path) -> dict[str, Any] | None:
    """Return the commit of the package's checkout, and whether it has changes; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # the environment may be inside another project's checkout
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _hub_commit(name: str, revision: str | None) -> str | None:
    for file in ("config.json", "adapter_config.json"):
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return extract_commit_hash(path, None)
    return None


class _Attempt(TypedDict):
    status: str


class _Record(TypedDict):
    attempts: list[_Attempt]


def _earlier_attempts(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    remedy = "It is not the record of a training run. Choose another output_dir."
    attempts = read_json(path, _Record, remedy)["attempts"]
    for attempt in attempts:
        if attempt["status"] == "running":
            attempt["status"] = "killed"  # or it is still running, which cannot be known here
    return attempts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
