"""What `minillm-trl evaluate` wrote, read back, and checked for whether it can be compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from ..errors import UserError
from ..files.json_files import check, parse_json
from .calibration import CalibrationBin
from .metrics import MeanInterval

# What must be the same for two models on a task; the texts themselves are compared one by one
_SAME = (
    "seeds",
    "greedy",
    "temperature",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "split",
    "prompts",
    "label_words",
)
_SAME_BENCHMARK = ("definition_sha256", "num_fewshot", "limit")


class _Settings(TypedDict):
    """Those of a group of benchmarks are lists where its tasks differ."""

    dataset: str
    split: Any
    prompts: int
    data_sha256: Any
    model: str
    adapter: str | None
    teacher: str | None
    seeds: list[int]
    greedy: Any
    temperature: Any
    no_repeat_ngram_size: Any
    max_new_tokens: Any
    label_words: list[str] | None
    exposure_bias_samples: int


class _BenchmarkSettings(_Settings):
    main_measure: str
    higher_is_better: dict[str, bool | None]
    definition_sha256: Any
    num_fewshot: Any
    limit: Any


class _Bucket(TypedDict):
    low: int
    high: int | None
    prompts: int
    summary: dict[str, MeanInterval]


class _ExposureBias(TypedDict):
    excess_error: list[float | None]
    counts_student: list[int]
    counts_teacher: list[int]


class _Calibration(TypedDict):
    ece: float
    bins: list[CalibrationBin]


class _Results(TypedDict):
    """`results.json`."""

    settings: _Settings
    summary: dict[str, MeanInterval]
    by_seed: dict[str, list[float]]
    corpus: dict[str, float]
    buckets: list[_Bucket]
    exposure_bias: _ExposureBias | None
    calibration: _Calibration | None
    per_prompt: list[dict[str, float]]


class _Message(TypedDict):
    role: str
    content: str


class _Sample(TypedDict):
    """A line of `samples.jsonl`."""

    prompt: str | list[_Message]
    references: list[str]
    outputs: list[str]
    scores: NotRequired[dict[str, list[float]]]


class _BenchmarkSample(TypedDict):
    """The same of lm-eval, whose answers may be numbers, and whose scores may be anything."""

    prompt: str
    references: list[str | float]
    outputs: list[str | float]
    scores: NotRequired[dict[str, list[Any]]]


class Bucket(NamedTuple):
    """Prompts whose first reference has `low` to `high` tokens (None: no upper end), and the measures over them."""

    low: int
    high: int | None
    prompts: int
    summary: dict[str, MeanInterval]


class LabelCalibration(NamedTuple):
    """Expected calibration error, in [0, 1], and the bins behind it."""

    ece: float
    bins: list[CalibrationBin]


@dataclass(frozen=True)
class TaskResult:
    """What `minillm-trl evaluate` wrote of a model on one task.

    Attributes:
        settings (`dict`): what was evaluated, and how.
        summary (`dict[str, MeanInterval]`): mean over prompts with its interval, by measure.
        by_seed (`dict[str, list[float]]`): the mean of each sampling seed.
        corpus (`dict[str, float]`): measures of all samples together.
        buckets (`list[Bucket]`): the measures by length of the reference; empty without references.
        excess_error (`list[float | None]`, *optional*): ExAccErr in per cent, if it was measured, at each position
            that a tenth of the samples of student and teacher reach; None where it is not defined.
        calibration ([`LabelCalibration`], *optional*): of a classification task.
        per_prompt (`list[dict[str, float]]`): each measure for each prompt, mean over the sampling seeds.
        samples (`list[dict]`): `prompt`, `references`, `outputs` and `scores` of each prompt.
    """

    settings: dict[str, Any]
    summary: dict[str, MeanInterval]
    by_seed: dict[str, list[float]]
    corpus: dict[str, float]
    buckets: list[Bucket]
    excess_error: list[float | None] | None
    calibration: LabelCalibration | None
    per_prompt: list[dict[str, float]]
    samples: list[dict[str, Any]]

    @property
    def is_benchmark(self) -> bool:
        """Whether `minillm-trl benchmark` wrote it, whose measures are called as by lm-eval."""
        return self.settings.get("kind") == "lm_eval"

    @property
    def main_measure(self) -> str | None:
        """What the task is judged by: `accuracy` of a classification, else `rouge_l`; None without references."""
        if self.is_benchmark:
            return self.settings["main_measure"]
        return next((key for key in ("accuracy", "rouge_l") if key in self.summary), None)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model's name in the tables, and its results by task."""

    name: str
    tasks: dict[str, TaskResult]


def read_evaluation(name: str, folder: Path) -> EvaluatedModel:
    """Read the folder of a model's evaluation.

    Args:
        name (`str`): of the model in the tables.
        folder (`Path`): with `results.json` and `samples.jsonl` of a dataset, or with a folder of both for each task.

    Raises:
        ValueError: if there are no results, or they cannot be read.
    """
    paths = [folder / "results.json"] if (folder / "results.json").is_file() else sorted(folder.glob("*/results.json"))
    if not paths:
        raise UserError(f"{folder}: no results of `minillm-trl evaluate`, neither results.json nor TASK/results.json.")
    tasks = {}
    for path in paths:
        try:
            result = _read_task(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not what `minillm-trl evaluate` writes ({error}). Evaluate again.") from error
        task = Path(result.settings["dataset"]).name if path.parent == folder else path.parent.name
        tasks[task] = result
    return EvaluatedModel(name, tasks)


def _read_task(path: Path) -> TaskResult:
    results = parse_json(path.read_bytes())
    check(results, _Results)
    sample_type = _Sample
    if results["settings"].get("kind") == "lm_eval":
        check(results["settings"], _BenchmarkSettings, "settings")
        sample_type = _BenchmarkSample
    exposure_bias, calibration = results["exposure_bias"], results["calibration"]
    if calibration is not None:
        calibration = LabelCalibration(calibration["ece"], [CalibrationBin(**each) for each in calibration["bins"]])
    samples = _read_samples(path.with_name("samples.jsonl"), sample_type)
    if len(samples) != len(results["per_prompt"]):
        raise UserError(f"samples.jsonl has {len(samples)} lines for {len(results['per_prompt'])} prompts")
    found = TaskResult(
        settings=results["settings"],
        summary=_intervals(results["summary"]),
        by_seed=results["by_seed"],
        corpus=results["corpus"],
        buckets=[
            Bucket(each["low"], each["high"], each["prompts"], _intervals(each["summary"]))
            for each in results["buckets"]
        ],
        excess_error=None if exposure_bias is None else _well_supported(exposure_bias),
        calibration=calibration,
        per_prompt=results["per_prompt"],
        samples=samples,
    )
    # some of lm-eval's measures, such as a perplexity, are no means over documents
    if not found.is_benchmark and any(results["summary"].keys() - row.keys() for row in results["per_prompt"]):
        raise UserError("a prompt lacks a measure of the summary")
    return found


def _read_samples(path: Path, sample_type: type) -> list[dict[str, Any]]:
    samples = []
    # splitlines would split at characters inside of texts too
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            try:
                samples.append(check(parse_json(line), sample_type))
            except ValueError as error:
                raise UserError(f"{path.name}:{number}: {error}") from error
    return samples


def _well_supported(exposure_bias: Mapping[str, Any]) -> list[float | None]:
    """The curve up to the last position that a tenth of the samples of both models reach: noise beyond."""
    counts = [exposure_bias[f"counts_{model}"] for model in ("student", "teacher")]
    kept = min(sum(10 * count >= each[0] for count in each) for each in counts)
    return exposure_bias["excess_error"][:kept]


def _intervals(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, MeanInterval]:
    return {key: MeanInterval(**each) for key, each in summary.items()}


def task_names(models: Iterable[EvaluatedModel]) -> list[str]:
    """The tasks that any of the models was evaluated on, in order."""
    return list(dict.fromkeys(task for model in models for task in model.tasks))


def results_of(models: Iterable[EvaluatedModel], task: str) -> dict[str, TaskResult]:
    """The results on a task by model, of the models that have any."""
    return {model.name: model.tasks[task] for model in models if task in model.tasks}


def teacher_names(models: Sequence[EvaluatedModel]) -> set[str]:
    """The models that were a teacher in another's evaluation."""
    results = [(model.name, result.settings) for model in models for result in model.tasks.values()]
    teachers = {settings["teacher"] for _, settings in results} - {None}
    return {name for name, settings in results if settings["model"] in teachers and settings["adapter"] is None}


def check_comparable(task: str, results: Mapping[str, TaskResult]) -> None:
    """Check that models were evaluated alike on a task.

    Args:
        task (`str`): its name.
        results (`Mapping[str, TaskResult]`): by model.

    Raises:
        ValueError: if two were evaluated with different settings, prompts or references, or how far they are from the
            teacher is to different ones; with the names of both.
    """
    (first, one), *others = results.items()
    for other, two in others:
        for key in (*_SAME, *_SAME_BENCHMARK) if one.is_benchmark and two.is_benchmark else _SAME:
            _check_same(task, {first: one, other: two}, key)
        # prompts of a benchmark hold the chat template of their tokenizer; digests tell of its documents
        texts = (("prompt", "on different prompts"), ("references", "with different references"))
        for key, said in texts if not one.is_benchmark else ():
            if [sample[key] for sample in one.samples] != [sample[key] for sample in two.samples]:
                raise UserError(f"{first} and {other} were evaluated {said} of {task}. Evaluate both alike.")
        if one.settings["data_sha256"] != two.settings["data_sha256"]:
            raise UserError(f"{first} and {other} were evaluated on different data of {task}. Evaluate both alike.")
    for (name, result), (other, another) in pairwise(_with_distance(results).items()):
        teachers = [each.settings["teacher"] for each in (result, another)]
        if teachers[0] != teachers[1]:
            raise UserError(
                f"{name} and {other}: the distance on {task} is to different teachers, {teachers[0]!r} and "
                f"{teachers[1]!r}. Evaluate both with one of them."
            )
    exposed = {name: result for name, result in results.items() if result.excess_error is not None}
    for pair in pairwise(exposed.items()):
        _check_same(task, dict(pair), "exposure_bias_samples")


def _check_same(task: str, pair: Mapping[str, TaskResult], key: str) -> None:
    (first, one), (other, two) = pair.items()
    if one.settings[key] != two.settings[key]:
        raise UserError(
            f"{first} and {other} were evaluated differently on {task}: {key} is {one.settings[key]!r} and "
            f"{two.settings[key]!r}. Evaluate both alike."
        )


def _with_distance(results: Mapping[str, TaskResult]) -> dict[str, TaskResult]:
    """Those that were compared with a teacher."""
    return {
        name: result
        for name, result in results.items()
        if result.excess_error is not None or {"reverse_kl", "forward_kl"} & result.summary.keys()
    }
