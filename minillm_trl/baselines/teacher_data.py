"""Collect a teacher's completions in a folder, and select those to fine-tune on."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from ..errors import UserError
from ..evaluation.metrics import rouge_l
from ..files.json_files import check, parse_json
from ..files.result_folder import ResultFolder
from ..files.whole_files import write_whole, writing

if TYPE_CHECKING:
    from datasets import Dataset

Job = tuple[int, int]  # number of the prompt, number of the sample
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_REMEDY = "Set teacher_data_dir to another folder, or delete this one."


class TeacherCompletion(NamedTuple):
    """One line of a `completions-<process>.jsonl` file."""

    row: int
    sample: int
    completion: str
    tokens: int
    finished: bool


def default_teacher_data_dir(output_dir: str) -> str:
    """Return a folder next to the run's folder, so that other runs can reuse the teacher's completions."""
    return f"{Path(output_dir)}_teacher_data"


class _Statistics(TypedDict):
    keep_unfinished: bool


class TeacherData:
    """Collect a teacher's completions in a folder, over any number of processes and runs.

    Each process appends to its own file, `completions-<process>.jsonl`. A line torn by a kill is generated again.
    `train.jsonl` and `statistics.json` are written when all completions are complete.

    Args:
        folder (`Path`): the folder.
        settings (`dict`): everything that the completions depend on, as JSON values.

    Raises:
        ValueError: if the folder holds completions made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.results = ResultFolder(folder, settings, "completions that were made", _REMEDY)

    @property
    def finished_with(self) -> bool | None:
        """Return the `keep_unfinished` with which `train.jsonl` was written; None if it was not written yet."""
        statistics = self.results.get("statistics", _Statistics)
        return None if statistics is None else statistics["keep_unfinished"]

    def read(self) -> dict[Job, TeacherCompletion]:
        """Return all completions so far, by the numbers of prompt and sample.

        Raises:
            ValueError: if a line is not a completion. Names the file and line.
        """
        found = {}
        for path in sorted(self.folder.glob("completions-*.jsonl")):
            *lines, _ = path.read_bytes().split(b"\n")  # a last line without a line break is torn
            for number, line in enumerate(lines, start=1):
                try:
                    completion = TeacherCompletion(**check(parse_json(line), TeacherCompletion))
                    completion.completion.encode()  # refuse unpaired surrogates, which JSON can escape
                except ValueError as error:
                    raise UserError(
                        f"{path}:{number}: not a completion of a teacher ({error}). Delete this line to generate it "
                        "again."
                    ) from error
                found[completion.row, completion.sample] = completion
        return found

    def open_share(self, process: int) -> Callable[[Sequence[TeacherCompletion]], None]:
        """Open or continue a process's file and return a function that appends to it and syncs to disk."""
        self.results.put("settings", self.results.settings)
        path = self.folder / f"completions-{process}.jsonl"
        if path.is_file():
            data = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

        def append(completions: Sequence[TeacherCompletion]) -> None:
            lines = (json.dumps(completion._asdict(), ensure_ascii=False) + "\n" for completion in completions)
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())

        return append

    def finish(self, prompts: "Dataset", keep_unfinished: bool) -> dict[str, Any]:
        """Write `train.jsonl` (fields `prompt`, `completion`) and `statistics.json`, and return the statistics.

        Drops empty completions, repeated completions of a prompt and, unless `keep_unfinished`, completions cut at the
        length limit. Can be called again with another `keep_unfinished`.

        Raises:
            ValueError: if a completion belongs to no prompt, or none is left to train on.
        """
        completions = [completion for _, completion in sorted(self.read().items())]
        if unknown := [completion.row for completion in completions if not 0 <= completion.row < len(prompts)]:
            raise UserError(f"{self.folder} answers prompt {unknown[0]}, but there are {len(prompts)}. {_REMEDY}")
        kept, dropped = _select(completions, keep_unfinished)
        if not kept:
            raise UserError(
                f"The teacher's {len(completions)} completions leave nothing to train on ({dict(dropped)}). Raise "
                f"max_completion_length, or check the completions in {self.folder}."
            )
        rows = [_example(prompts[completion.row]["prompt"], completion.completion) for completion in kept]
        statistics = _statistics(completions, prompts, len(rows), dropped, keep_unfinished)
        # statistics.json marks train.jsonl as complete, so remove it first and write it last
        (self.folder / "statistics.json").unlink(missing_ok=True)
        write_whole(self.folder / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.results.put("statistics", statistics)
        return statistics


def _select(
    completions: Sequence[TeacherCompletion], keep_unfinished: bool
) -> tuple[list[TeacherCompletion], Counter[str]]:
    """Return the completions to train on, and the number of the others by reason."""
    kept: list[TeacherCompletion] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[int, str]] = set()
    for completion in completions:
        key = (completion.row, completion.completion)
        if not completion.completion.strip():
            dropped["empty"] += 1
        elif not (completion.finished or keep_unfinished):
            dropped["cut at the length limit"] += 1
        elif key in seen:
            dropped["said before to the same prompt"] += 1
        else:
            seen.add(key)
            kept.append(completion)
    return kept, dropped


def _statistics(
    completions: Sequence[TeacherCompletion],
    prompts: "Dataset",
    kept: int,
    dropped: Counter[str],
    keep_unfinished: bool,
) -> dict[str, Any]:
    """Return the content of `statistics.json`, with quantiles of all completions' lengths in tokens."""
    lengths = np.quantile([completion.tokens for completion in completions], QUANTILES).tolist()
    statistics: dict[str, Any] = {
        "completions": len(completions),
        "keep_unfinished": keep_unfinished,
        "kept": kept,
        "dropped": dict(dropped),
        "tokens": {f"{quantile:.0%}": length for quantile, length in zip(QUANTILES, lengths, strict=True)},
    }
    if "references" in prompts.column_names:
        scores = [
            rouge_l(completion.completion, references)
            for completion in completions
            if (references := prompts[completion.row]["references"])
        ]
        if scores:
            statistics["rouge_l"] = float(np.mean(scores))
    return statistics


def _example(prompt: Any, completion: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}
