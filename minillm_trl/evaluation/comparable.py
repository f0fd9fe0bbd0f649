"""Check that models were evaluated in the same way, so that their results can be compared."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..errors import UserError
from .decodings import Decoding
from .results import EvaluatedModel, TaskResult, decodings_of, results_of

# Settings that must be equal for two models on a task. Prompts and references are compared row by row
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
_SAME_WAY = "Evaluate both in the same way."


# Settings that a model's decodings of one task have in common
_SAME_TASK = ("no_repeat_ngram_size", "max_new_tokens", "split", "prompts", "data_sha256", "model", "adapter")


def check_models(models: Sequence[EvaluatedModel], task: str) -> None:
    """Check that models were evaluated on a task in the same way, at each temperature and on each split.

    Two models may have different temperatures, since curves over entropy are interpolated.

    Raises:
        ValueError: see [`check_comparable`]; also if a model's decodings differ in more than temperature.
    """
    check_comparable(task, results_of(models, task))
    decodings = decodings_of(models, task)
    for name, by_split in decodings.items():
        for results in (by_split.test, by_split.validation):
            _check_decodings(f"{task} by {name}", results)
    for split, place in (("test", task), ("validation", f"{task}, validation")):
        by_model = {name: getattr(by_split, split) for name, by_split in decodings.items()}
        for decoding in dict.fromkeys(decoding for results in by_model.values() for decoding in results):
            compared = {name: results[decoding] for name, results in by_model.items() if decoding in results}
            check_comparable(f"{place} ({decoding})", compared)
    validations = {
        name: next(iter(by_split.validation.values())) for name, by_split in decodings.items() if by_split.validation
    }
    for pair in pairwise(validations.items()):
        _check_same(f"{task}, validation", dict(pair), "data_sha256")


def _check_decodings(place: str, results: Mapping[Decoding, TaskResult]) -> None:
    for (one, first), (two, second) in pairwise(results.items()):
        sampled = ("seeds",) * (one.temperature is not None and two.temperature is not None)
        for key in (*_SAME_TASK, *sampled):
            _check_same(place, {str(one): first, str(two): second}, key)
    _check_teachers(place, {str(decoding): result for decoding, result in results.items()})


def check_comparable(task: str, results: Mapping[str, TaskResult]) -> None:
    """Check that models were evaluated in the same way on a task.

    Args:
        task (`str`): name of the task.
        results (`Mapping[str, TaskResult]`): results by model.

    Raises:
        ValueError: if two models were evaluated with different settings, prompts or references, or their divergences
            are from different teachers.
    """
    (first, one), *others = results.items()
    for other, two in others:
        for key in (*_SAME, *_SAME_BENCHMARK) if one.is_benchmark and two.is_benchmark else _SAME:
            _check_same(task, {first: one, other: two}, key)
        # A benchmark's prompts contain the tokenizer's chat template, so only digests of its documents are compared
        texts = (("prompt", "on different prompts"), ("references", "with different references"))
        for key, difference in texts if not one.is_benchmark else ():
            if [sample[key] for sample in one.samples] != [sample[key] for sample in two.samples]:
                raise UserError(f"{first} and {other} were evaluated {difference} of {task}. {_SAME_WAY}")
        if one.settings["data_sha256"] != two.settings["data_sha256"]:
            raise UserError(f"{first} and {other} were evaluated on different data of {task}. {_SAME_WAY}")
    _check_teachers(task, results)
    exposed = {name: result for name, result in results.items() if result.excess_error is not None}
    for pair in pairwise(exposed.items()):
        _check_same(task, dict(pair), "exposure_bias_samples")


def _check_same(task: str, pair: Mapping[str, TaskResult], key: str) -> None:
    (first, one), (other, two) = pair.items()
    if one.settings[key] != two.settings[key]:
        raise UserError(
            f"{first} and {other} were evaluated differently on {task}: {key} is {one.settings[key]!r} and "
            f"{two.settings[key]!r}. {_SAME_WAY}"
        )


def _check_teachers(task: str, results: Mapping[str, TaskResult]) -> None:
    for (name, result), (other, other_result) in pairwise(_with_divergence(results).items()):
        teachers = [result.settings["teacher"], other_result.settings["teacher"]]
        if teachers[0] != teachers[1]:
            raise UserError(
                f"{name} and {other}: the divergences on {task} are from different teachers, {teachers[0]!r} and "
                f"{teachers[1]!r}. Evaluate both with the same teacher."
            )
        temperatures = [_teacher_temperature(result), _teacher_temperature(other_result)]
        if temperatures[0] != temperatures[1]:
            raise UserError(
                f"{name} and {other}: the divergences on {task} are from the teacher at teacher_temperature "
                f"{temperatures[0]:g} and {temperatures[1]:g}. Evaluate both with the same --teacher_temperature."
            )


def _teacher_temperature(result: TaskResult) -> float:
    temperature = result.settings.get("teacher_temperature")
    return result.settings["temperature"] if temperature is None else temperature


def _with_divergence(results: Mapping[str, TaskResult]) -> dict[str, TaskResult]:
    """Return the results that have a divergence from a teacher."""
    return {
        name: result
        for name, result in results.items()
        if result.excess_error is not None or {"reverse_kl", "forward_kl"} & result.summary.keys()
    }
