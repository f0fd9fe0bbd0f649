"""Runs a task of lm-eval, and turns what it logs of each document into the shape of our results."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .general_benchmarks import max_new_tokens
from .metrics import MeanInterval, bootstrap_interval

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = "bootstrap over documents"
STANDARD_ERROR = "1.96 standard errors of lm-eval"
_NORMAL = 1.96  # half the width of a 95 % interval, in standard errors


@dataclass(frozen=True)
class TaskOutcome:
    """What [`evaluate_task`] measured; measures are called as by lm-eval, `METRIC,FILTER`, the filter `none` left out.

    Attributes:
        main_measure (`str`): the first in the task's definition.
        higher_is_better (`dict[str, bool]`): of each measure, as the task says; None where it does not.
        summary (`dict[str, MeanInterval]`): means over documents, and other metrics with lm-eval's standard error.
        intervals (`dict[str, str]`): where the interval of each comes from, [`BOOTSTRAP`] or [`STANDARD_ERROR`].
        corpus (`dict[str, float]`): metrics of all documents together that lm-eval has no standard error of.
        per_prompt (`list[dict[str, float]]`): of each document, the measures that are means over them.
        samples (`list[dict]`): `prompt`, `references`, `outputs` and `scores` of each document.
        truncated_prompts (`int`): documents of whose prompt the model was shown the end only.
    """

    main_measure: str
    higher_is_better: dict[str, bool | None]
    summary: dict[str, MeanInterval]
    intervals: dict[str, str]
    corpus: dict[str, float]
    per_prompt: list[dict[str, float]]
    samples: list[dict[str, Any]]
    truncated_prompts: int


def wrap_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int | str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> "HFLM":
    """The model as lm-eval takes it.

    Args:
        model ([`~transformers.PreTrainedModel`]): on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        batch_size (`int` or `str`): requests run together, or `"auto"` for as many as fit.
        chat_template_kwargs (`dict`, *optional*): what else the chat template is given.
    """
    from lm_eval.models.huggingface import HFLM

    # it warns that the model is loaded already, and of each truncated batch; documents are counted here
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    options = {"batch_size": batch_size, "chat_template_args": chat_template_kwargs}
    return HFLM(pretrained=model, tokenizer=tokenizer, **options)


def evaluate_task(
    lm: "HFLM",
    task: "Task",
    *,
    limit: int | None = None,
    apply_chat_template: bool = False,
    run_unsafe_code: bool = False,
) -> TaskOutcome:
    """Evaluate a model on a task with lm-eval.

    Args:
        lm (`HFLM`): from [`wrap_model`].
        task (`Task`): of lm-eval, with its number of examples set.
        limit (`int`, *optional*): number of documents; all by default.
        apply_chat_template (`bool`, *optional*, defaults to `False`): whether prompts are conversations.
        run_unsafe_code (`bool`, *optional*, defaults to `False`): whether the task may run what the model writes.

    Returns:
        [`TaskOutcome`].
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    outcome = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # the task is loaded
        limit=limit,
        apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=run_unsafe_code,
    )
    documents: dict[int, list[dict[str, Any]]] = {}  # one record for each filter of the answers
    for record in outcome["samples"][task.task_name]:
        documents.setdefault(record["doc_id"], []).append(record)
    return _outcome(lm, task, outcome["results"][task.task_name], list(documents.values()))


def _outcome(
    lm: "HFLM", task: "Task", results: dict[str, Any], documents: Sequence[list[dict[str, Any]]]
) -> TaskOutcome:
    from lm_eval.api.metrics import mean

    summary, intervals, corpus = {}, {}, {}
    per_prompt: list[dict[str, float]] = [{} for _ in documents]
    scores: list[dict[str, list[Any]]] = [{} for _ in documents]
    keys = [key for key in results if "," in key and not key.partition(",")[0].endswith("_stderr")]
    for key in keys:
        metric, _, answer_filter = key.partition(",")
        measure, error = _measure(key), results[f"{metric}_stderr,{answer_filter}"]
        for row, records in enumerate(documents):
            for value in (each[metric] for each in records if each["filter"] == answer_filter and metric in each):
                scores[row][measure] = [_plain(value)]
        if task.aggregation().get(metric, mean) is mean:  # what lm-eval takes for others too
            for row, each in enumerate(scores):
                if measure in each:
                    per_prompt[row][measure] = float(each[measure][0])
            values = [row[measure] for row in per_prompt if measure in row]
            summary[measure], intervals[measure] = bootstrap_interval(values), BOOTSTRAP
        elif error == "N/A":
            corpus[measure] = float(results[key])
        else:
            summary[measure] = _normal_interval(float(results[key]), float(error), len(documents))
            intervals[measure] = STANDARD_ERROR
    samples = [{**_sample(task, records[0]), "scores": each} for records, each in zip(documents, scores, strict=True)]
    better = task.higher_is_better()
    return TaskOutcome(
        main_measure=_measure(keys[0]),
        higher_is_better={_measure(key): better.get(key.partition(",")[0]) for key in keys},
        summary=summary,
        intervals=intervals,
        corpus=corpus,
        per_prompt=per_prompt,
        samples=samples,
        truncated_prompts=sum(_is_truncated(lm, task, records[0]) for records in documents),
    )


def _measure(key: str) -> str:
    return key.removesuffix(",none")


def _normal_interval(value: float, error: float, n: int) -> MeanInterval:
    return MeanInterval(value, value - _NORMAL * error, value + _NORMAL * error, n, error)


def _plain(value: Any) -> Any:
    """Numbers of numpy, also inside of lists and tuples, as Python's, which JSON takes."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _sample(task: "Task", record: dict[str, Any]) -> dict[str, Any]:
    sample = {"prompt": record["arguments"][0][0]}
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(record["doc"])
        likelihoods = [response[0][0] for response in record["resps"][: len(choices)]]
        # with several inputs the choices are parts of the prompts, and the target is what follows
        gold = task.doc_to_text(record["doc"]) if task.multiple_input else record["target"]
        references = [_choice(each, choices) for each in (gold if isinstance(gold, list) else [gold])]
        return {**sample, "references": references, "outputs": [choices[likelihoods.index(max(likelihoods))]]}
    target = record["target"]
    references = [str(each) for each in (target if isinstance(target, list) else [target])]
    # what the model wrote; the other kinds only measure the likelihood of the target
    outputs = list(record["resps"][0]) if task.OUTPUT_TYPE == "generate_until" else []
    return {**sample, "references": references, "outputs": outputs}


def _choice(gold: int | str, choices: Sequence[str]) -> str:
    return choices[gold] if isinstance(gold, int) and 0 <= gold < len(choices) else str(gold)


def _is_truncated(lm: "HFLM", task: "Task", record: dict[str, Any]) -> bool:
    """Whether lm-eval had to cut off the beginning of a document's prompt."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # reads long texts in several windows
        return False
    if (length := max_new_tokens(task)) is not None:
        return len(lm.tok_encode(record["arguments"][0][0])) > lm.max_length - length
    # of prompt and answer the model reads all tokens but the last
    return any(len(lm.tok_encode(prompt + answer)) > lm.max_length + 1 for prompt, answer in record["arguments"])


def pool(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pool the results of a group's tasks: each document counts alike, as with lm-eval's `weight_by_size`.

    Args:
        parts (`Sequence[dict]`): what is in `results.json` of each task.

    Returns:
        `dict[str, Any]` with `summary`, `intervals`, `per_prompt` and `truncated_prompts`, of the measures that are
        means over documents in all tasks.
    """
    measures = [
        measure
        for measure in parts[0]["intervals"]
        if all(part["intervals"].get(measure) == BOOTSTRAP for part in parts)
    ]
    per_prompt = [
        {measure: row[measure] for measure in measures if measure in row}
        for part in parts
        for row in part["per_prompt"]
    ]
    summary = {
        measure: bootstrap_interval([row[measure] for row in per_prompt if measure in row]) for measure in measures
    }
    return {
        "summary": summary,
        "intervals": dict.fromkeys(measures, BOOTSTRAP),
        "per_prompt": per_prompt,
        "truncated_prompts": sum(part["truncated_prompts"] for part in parts),
    }
