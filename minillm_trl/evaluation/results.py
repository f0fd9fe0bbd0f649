"""Read the results of `minillm-trl evaluate`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from ..errors import UserError
from ..files.json_files import check, parse_json
from .calibration import CalibrationBin
from .decodings import PAPER, VALIDATION, Decoding, is_reserved
from .statistics import MeanInterval


class _Settings(TypedDict):
    """`settings` in `results.json`. A group of benchmarks has lists where its tasks differ, hence `Any`."""

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
    decoding: NotRequired[str | None]
    teacher_temperature: NotRequired[float | None]


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
    """Contents of `results.json`."""

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
    """A line of `samples.jsonl` from lm-eval, whose answers may be numbers and whose scores may be of any type."""

    prompt: str
    references: list[str | float]
    outputs: list[str | float]
    scores: NotRequired[dict[str, list[Any]]]


class Bucket(NamedTuple):
    """Number and measures of prompts whose first reference has `low` to `high` tokens (None for no upper limit)."""

    low: int
    high: int | None
    prompts: int
    summary: dict[str, MeanInterval]


class LabelCalibration(NamedTuple):
    """Expected calibration error, in [0, 1], and its bins."""

    ece: float
    bins: list[CalibrationBin]


@dataclass(frozen=True)
class TaskResult:
    """Results of a model on one task, as `minillm-trl evaluate` wrote them.

    Attributes:
        settings (`dict`): model, data and decoding settings.
        summary (`dict[str, MeanInterval]`): mean over prompts with its interval, by measure.
        by_seed (`dict[str, list[float]]`): the mean of each sampling seed.
        corpus (`dict[str, float]`): measures over all samples together.
        buckets (`list[Bucket]`): the measures by reference length; empty without references.
        excess_error (`list[float | None]`, *optional*): ExAccErr in percent, if measured, at each position
            that a tenth of the samples of student and teacher reach; None where it is undefined.
        calibration ([`LabelCalibration`], *optional*): calibration of a classification task.
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
        """Whether the results are from `minillm-trl benchmark`, where measures have lm-eval's names."""
        return self.settings.get("kind") == "lm_eval"

    @property
    def main_measure(self) -> str | None:
        """Measure that ranks models: `accuracy` for classification, else `rouge_l`; None without references."""
        if self.is_benchmark:
            return self.settings["main_measure"]
        return next((key for key in ("accuracy", "rouge_l") if key in self.summary), None)

    @property
    def decoding(self) -> Decoding | None:
        """How completions were decoded; None for classification and benchmarks."""
        if self.is_benchmark or self.settings["label_words"] is not None:
            return None
        return Decoding(None if self.settings["greedy"] else self.settings["temperature"])


@dataclass(frozen=True)
class DecodingResults:
    """Results of a model on one task at several `--temperatures`, on the test split and the validation split."""

    test: dict[Decoding, TaskResult]
    validation: dict[Decoding, TaskResult]

    @property
    def table_result(self) -> TaskResult:
        """Result that tables of one decoding show: temperature 1, as in the paper, else the highest temperature."""
        return self.test[max(self.test, key=lambda decoding: (decoding == PAPER, decoding.temperature or 0))]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model's name in tables, and its results by task.

    Attributes:
        name (`str`): the name.
        tasks (`dict[str, TaskResult]`): result that tables show, by task.
        decodings (`dict[str, DecodingResults]`): results at all temperatures, for tasks evaluated at several.
    """

    name: str
    tasks: dict[str, TaskResult]
    decodings: dict[str, DecodingResults] = field(default_factory=dict)


def read_evaluation(name: str, folder: Path) -> EvaluatedModel:
    """Read a model's evaluation folder.

    Args:
        name (`str`): the model's name in tables.
        folder (`Path`): folder with `results.json` and `samples.jsonl`, or with one such folder per task. Results of
            `--temperatures` have a folder per decoding there.

    Raises:
        ValueError: if there are no results, or they are invalid.
    """
    found = {folder: _read_folder(folder)}
    if found[folder] is None:
        found = {path: _read_folder(path) for path in sorted(folder.glob("*")) if _is_task(path)}
    tasks, decodings = {}, {}
    for path, contents in found.items():
        if contents is None:
            continue
        result, by_decoding = contents
        task = Path(result.settings["dataset"]).name if path == folder else path.name
        tasks[task] = result
        if by_decoding is not None:
            decodings[task] = by_decoding
    if not tasks:
        raise UserError(f"{folder}: no results.json or TASK/results.json. Create them with `minillm-trl evaluate`.")
    return EvaluatedModel(name, tasks, decodings)


def _is_task(path: Path) -> bool:
    """Return whether a folder may hold a task, and not only the validation results of one whose test is not done."""
    return path.is_dir() and (path.name != VALIDATION or (path / "results.json").is_file())


def _read_folder(folder: Path) -> tuple[TaskResult, DecodingResults | None] | None:
    """Return the results of one task: those for tables, and those of all decodings; None if there are no results."""
    by_decoding = _read_decodings(folder)
    path = folder / "results.json"
    if not path.is_file():
        if not by_decoding:
            return None
        decodings = DecodingResults(by_decoding, _read_decodings(folder / VALIDATION))
        return decodings.table_result, decodings
    if by_decoding:
        raise UserError(
            f"{folder} has results of --temperatures and {path} without them. Delete one of them, or evaluate again."
        )
    return _read_results(path), None


def _read_decodings(folder: Path) -> dict[Decoding, TaskResult]:
    """Return the results of `--temperatures` in the folders of a task, from the highest temperature to greedy.

    A task may have the name of a decoding, such as `greedy`, so the settings decide.
    """
    paths = [path for path in folder.glob("*/results.json") if is_reserved(path.parent.name)]
    results = {path.parent.name: _read_results(path) for path in paths}
    found = [result for name, result in results.items() if result.settings.get("decoding") == name]
    by_decoding = {result.decoding: result for result in found if result.decoding is not None}
    return dict(sorted(by_decoding.items(), key=lambda item: -(item[0].temperature or 0)))


def _read_results(path: Path) -> TaskResult:
    try:
        return _read_task(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: invalid results of `minillm-trl evaluate` ({error}). Evaluate again.") from error


def _read_task(path: Path) -> TaskResult:
    results = parse_json(path.read_bytes())
    check(results, _Results)
    sample_type: type = _Sample
    if results["settings"].get("kind") == "lm_eval":
        check(results["settings"], _BenchmarkSettings, "settings")
        sample_type = _BenchmarkSample
    exposure_bias, calibration = results["exposure_bias"], results["calibration"]
    if calibration is not None:
        calibration = LabelCalibration(
            calibration["ece"], [CalibrationBin(**values) for values in calibration["bins"]]
        )
    samples = _read_samples(path.with_name("samples.jsonl"), sample_type)
    if len(samples) != len(results["per_prompt"]):
        raise UserError(f"samples.jsonl has {len(samples)} lines for {len(results['per_prompt'])} prompts")
    result = TaskResult(
        settings=results["settings"],
        summary=_intervals(results["summary"]),
        by_seed=results["by_seed"],
        corpus=results["corpus"],
        buckets=[
            Bucket(values["low"], values["high"], values["prompts"], _intervals(values["summary"]))
            for values in results["buckets"]
        ],
        excess_error=None if exposure_bias is None else _well_supported(exposure_bias),
        calibration=calibration,
        per_prompt=results["per_prompt"],
        samples=samples,
    )
    # Some of lm-eval's measures, such as perplexity, are not means over documents
    if not result.is_benchmark and any(results["summary"].keys() - row.keys() for row in results["per_prompt"]):
        raise UserError("a prompt lacks a measure of the summary")
    return result


def _read_samples(path: Path, sample_type: type) -> list[dict[str, Any]]:
    samples = []
    # splitlines would also split at other line separators inside texts
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            try:
                samples.append(check(parse_json(line), sample_type))
            except ValueError as error:
                raise UserError(f"{path.name}:{number}: {error}") from error
    return samples


def _well_supported(exposure_bias: Mapping[str, Any]) -> list[float | None]:
    """Cut the curve at the last position that a tenth of both models' samples reach; beyond it is noise."""
    counts_by_model = [exposure_bias[f"counts_{model}"] for model in ("student", "teacher")]
    positions = min(sum(10 * count >= counts[0] for count in counts) for counts in counts_by_model)
    return exposure_bias["excess_error"][:positions]


def _intervals(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, MeanInterval]:
    return {key: MeanInterval(**interval) for key, interval in summary.items()}


def task_names(models: Iterable[EvaluatedModel]) -> list[str]:
    """Return all tasks of the models, in order of appearance."""
    return list(dict.fromkeys(task for model in models for task in model.tasks))


def results_of(models: Iterable[EvaluatedModel], task: str) -> dict[str, TaskResult]:
    """Return the results on a task by model, for models evaluated on it."""
    return {model.name: model.tasks[task] for model in models if task in model.tasks}


def decodings_of(models: Iterable[EvaluatedModel], task: str) -> dict[str, DecodingResults]:
    """Return the results at all temperatures on a task by model, for models evaluated at several."""
    return {model.name: model.decodings[task] for model in models if task in model.decodings}


def teacher_names(models: Sequence[EvaluatedModel]) -> set[str]:
    """Return the names of models that were the teacher in another model's evaluation."""
    results = [(model.name, result.settings) for model in models for result in model.tasks.values()]
    teachers = {settings["teacher"] for _, settings in results if settings["teacher"] is not None}
    return {name for name, settings in results if settings["model"] in teachers and settings["adapter"] is None}
