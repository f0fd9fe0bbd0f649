"""Run a task of lm-eval and convert its per-document log into the format of our results."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .general_benchmarks import max_new_tokens
from .statistics import MeanInterval, bootstrap_interval

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = "bootstrap over documents"
STANDARD_ERROR = "1.96 standard errors of lm-eval"
_Z95 = 1.96  # standard errors in half a 95 % interval


@dataclass(frozen=True)
class TaskOutcome:
    """Results of [`evaluate_task`]. Measures have lm-eval's names, `METRIC,FILTER`, without the filter `none`.

    Attributes:
        main_measure (`str`): first measure in the task's definition.
        higher_is_better (`dict[str, bool]`): by measure, as the task defines it; None if it does not.
        summary (`dict[str, MeanInterval]`): means over documents, and other metrics with
            lm-eval's standard error.
        intervals (`dict[str, str]`): source of each interval, [`BOOTSTRAP`] or [`STANDARD_ERROR`].
        corpus (`dict[str, float]`): metrics over all documents without standard error.
        per_prompt (`list[dict[str, float]]`): for each document, the measures that are means over documents.
        samples (`list[dict]`): `prompt`, `references`, `outputs` and `scores` of each document.
        truncated_prompts (`int`): documents whose prompt lm-eval truncated at the start.
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
    """Wrap a model for lm-eval.

    Args:
        model ([`~transformers.PreTrainedModel`]): on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        batch_size (`int` or `str`): requests per batch, or `"auto"` for the largest that fits.
        chat_template_kwargs (`dict`, *optional*): more arguments for the chat template.
    """
    from lm_eval.models.huggingface import HFLM

    # HFLM warns that the model is already loaded and about each truncated batch; `_is_truncated` counts documents
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
        task (`Task`): lm-eval task, after [`set_num_fewshot`].
        limit (`int`, *optional*): number of documents; all by default.
        apply_chat_template (`bool`, *optional*, defaults to `False`): whether to format prompts with the chat
            template.
        run_unsafe_code (`bool`, *optional*, defaults to `False`): whether the task may execute generated code.

    Returns:
        [`TaskOutcome`].
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    outcome = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # the task is already loaded
        limit=limit,
        apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=run_unsafe_code,
    )
    documents: dict[int, list[dict[str, Any]]] = {}  # one record per answer filter
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
            for value in (log[metric] for log in records if log["filter"] == answer_filter and metric in log):
                scores[row][measure] = [_plain(value)]
        if task.aggregation().get(metric, mean) is mean:  # lm-eval's default too
            for row, document_scores in enumerate(scores):
                if measure in document_scores:
                    per_prompt[row][measure] = float(document_scores[measure][0])
            values = [row[measure] for row in per_prompt if measure in row]
            summary[measure], intervals[measure] = bootstrap_interval(values), BOOTSTRAP
        elif error == "N/A":
            corpus[measure] = float(results[key])
        else:
            summary[measure] = _normal_interval(float(results[key]), float(error), len(documents))
            intervals[measure] = STANDARD_ERROR
    samples = [
        {**_sample(task, records[0]), "scores": document_scores}
        for records, document_scores in zip(documents, scores, strict=True)
    ]
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
    return MeanInterval(value, value - _Z95 * error, value + _Z95 * error, n, error)


def _plain(value: Any) -> Any:
    """Convert numpy numbers, also inside lists and tuples, to Python numbers for JSON."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _sample(task: "Task", record: dict[str, Any]) -> dict[str, Any]:
    sample = {"prompt": record["arguments"][0][0]}
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(record["doc"])
        likelihoods = [response[0][0] for response in record["resps"][: len(choices)]]
        # With `multiple_input` (as in Winogrande) the choices are part of the prompts, and the target follows them
        gold = task.doc_to_text(record["doc"]) if task.multiple_input else record["target"]
        references = [_choice(answer, choices) for answer in (gold if isinstance(gold, list) else [gold])]
        return {**sample, "references": references, "outputs": [choices[likelihoods.index(max(likelihoods))]]}
    target = record["target"]
    references = [str(text) for text in (target if isinstance(target, list) else [target])]
    # Other output types only score the target and generate nothing
    outputs = list(record["resps"][0]) if task.OUTPUT_TYPE == "generate_until" else []
    return {**sample, "references": references, "outputs": outputs}


def _choice(gold: int | str, choices: Sequence[str]) -> str:
    return choices[gold] if isinstance(gold, int) and 0 <= gold < len(choices) else str(gold)


def _is_truncated(lm: "HFLM", task: "Task", record: dict[str, Any]) -> bool:
    """Return whether lm-eval truncated the start of a document's prompt."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # splits long texts into windows
        return False
    if (length := max_new_tokens(task)) is not None:
        return len(lm.tok_encode(record["arguments"][0][0])) > lm.max_length - length
    # The model reads all tokens of prompt and answer except the last
    return any(len(lm.tok_encode(prompt + answer)) > lm.max_length + 1 for prompt, answer in record["arguments"])


def pool(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pool the results of a group's tasks with equal weight per document, as with lm-eval's `weight_by_size`.

    Args:
        parts (`Sequence[dict]`): contents of `results.json` of each task.

    Returns:
        `dict[str, Any]`: `summary`, `intervals`, `per_prompt` and `truncated_prompts`, for the measures that are means
        over documents in all tasks.
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
