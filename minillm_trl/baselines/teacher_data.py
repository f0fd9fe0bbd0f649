"""The folder in which the completions of a teacher are gathered, and what is learnt from them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from ..errors import UserError
from ..evaluation.metrics import rouge_l
from ..files.json_files import check, check_unchanged, parse_json, read_json
from ..files.whole_files import make_folder, write_whole, writing

if TYPE_CHECKING:
    from datasets import Dataset

Job = tuple[int, int]  # number of the prompt, and of its sample
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_MEND = "Set teacher_data_dir to another folder, or delete this one."


class TeacherCompletion(NamedTuple):
    """One line of a file of completions."""

    row: int
    sample: int
    completion: str
    tokens: int
    finished: bool


def default_teacher_data_dir(output_dir: str) -> str:
    """Beside the run and not in it, so that another run of the student need not ask the teacher again."""
    return f"{Path(output_dir)}_teacher_data"


class _Statistics(TypedDict):
    keep_unfinished: bool


class TeacherData:
    """The folder in which a teacher's completions are gathered, by any number of processes and runs.

    Each process appends to a file of its own, `completions-<process>.jsonl`, line by line; a line that a kill has torn
    is made again. `train.jsonl` and `statistics.json` appear when all completions are there.

    Args:
        folder (`Path`): the folder.
        settings (`dict`): what the completions depend on, JSON values.

    Raises:
        ValueError: if the folder has completions that were made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        path = folder / "settings.json"
        if path.is_file():
            found = read_json(path, dict[str, Any], _MEND)
            check_unchanged(found, self.settings, f"{folder} holds completions that were made", _MEND)

    @property
    def finished_with(self) -> bool | None:
        """The `keep_unfinished` that `train.jsonl` was made with; None before there is one."""
        path = self.folder / "statistics.json"
        return read_json(path, _Statistics, _MEND)["keep_unfinished"] if path.is_file() else None

    def read(self) -> dict[Job, TeacherCompletion]:
        """All completions that are there, by number of prompt and sample.

        Raises:
            ValueError: if a line is no completion, with file and line.
        """
        found = {}
        for path in sorted(self.folder.glob("completions-*.jsonl")):
            *lines, _ = path.read_bytes().split(b"\n")  # what ends without a line break is torn
            for number, line in enumerate(lines, start=1):
                try:
                    completion = TeacherCompletion(**check(parse_json(line), TeacherCompletion))
                    completion.completion.encode()  # JSON can escape half a surrogate pair, but not write it
                except ValueError as error:
                    raise UserError(
                        f"{path}:{number}: no completion of a teacher ({error}). Delete this line, and it is "
                        "generated again."
                    ) from error
                found[completion.row, completion.sample] = completion
        return found

    def open_share(self, process: int) -> Callable[[Sequence[TeacherCompletion]], None]:
        """Begin or go on with a process's file; the function returned appends to it, on disk before it returns."""
        make_folder(self.folder)
        write_whole(self.folder / "settings.json", json.dumps(self.settings, indent=1))
        path = self.folder / f"completions-{process}.jsonl"
        if path.is_file():
            data = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

        def append(completions: Sequence[TeacherCompletion]) -> None:
            lines = (json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in completions)
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())

        return append

    def finish(self, prompts: "Dataset", keep_unfinished: bool) -> dict[str, Any]:
        """Write `train.jsonl` (fields `prompt`, `completion`) and `statistics.json`, and return the statistics.

        Empty completions and those that say what another one said to the same prompt are left out, and unless
        `keep_unfinished` those that were cut at the length limit. May be called again with another value of it.
        """
        completions = [each for _, each in sorted(self.read().items())]
        if astray := [each.row for each in completions if not 0 <= each.row < len(prompts)]:
            raise UserError(f"{self.folder} answers prompt {astray[0]}, but there are {len(prompts)}. {_MEND}")
        rows, dropped, seen = [], Counter(), set()
        for each in completions:
            if not each.completion.strip():
                dropped["empty"] += 1
            elif not (each.finished or keep_unfinished):
                dropped["cut at the length limit"] += 1
            elif (each.row, each.completion) in seen:
                dropped["said before to the same prompt"] += 1
            else:
                seen.add((each.row, each.completion))
                rows.append(_example(prompts[each.row]["prompt"], each.completion))
        if not rows:
            raise UserError(
                f"None of the teacher's {len(completions)} completions can be learnt from ({dict(dropped)}). Raise "
                "max_completion_length, or look at them in " + str(self.folder)
            )
        lengths = np.quantile([each.tokens for each in completions], QUANTILES).tolist()
        statistics = {
            "completions": len(completions),
            "keep_unfinished": keep_unfinished,
            "kept": len(rows),
            "dropped": dict(dropped),
            "tokens": {f"{quantile:.0%}": length for quantile, length in zip(QUANTILES, lengths, strict=True)},
        }
        if "references" in prompts.column_names:
            scores = [
                rouge_l(each.completion, references)
                for each in completions
                if (references := prompts[each.row]["references"])
            ]
            if scores:
                statistics["rouge_l"] = float(np.mean(scores))
        (self.folder / "statistics.json").unlink(missing_ok=True)  # until it tells of the new train.jsonl
        write_whole(self.folder / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_whole(self.folder / "statistics.json", json.dumps(statistics, indent=1))
        return statistics


def _example(prompt: Any, completion: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}
