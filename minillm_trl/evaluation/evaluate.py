"""Evaluate a model on prompts: sample with several seeds, score, and compute intervals over prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .calibration import Calibration
from .exposure_bias import ExposureBias, excess_accumulated_error
from .metrics import distinct_ngrams, distinct_outputs, self_bleu
from .parts import Parts
from .statistics import MeanInterval, bootstrap_interval
from .task_measures import NGRAM, SharedMeasures, TaskMeasures

# Ranges of the first reference's length in tokens, as in the paper's Figures 7 and 15 (S-NI and UnNI)
BUCKETS = ((0, 5), (6, 10), (11, None))


@dataclass(frozen=True)
class Evaluation:
    """Results of [`evaluate_model`] or [`classify_model`].

    Attributes:
        summary (`dict[str, MeanInterval]`): mean over prompts with a bootstrap interval, by measure.
        per_prompt (`list[dict[str, float]]`): each measure for each prompt, mean over the sampling seeds.
        samples (`list[dict]`): `prompt`, `references`, the `outputs` of all seeds, and their `scores` by measure.
        settings (`dict`): decoding settings and the number of prompts.
        by_seed (`dict[str, list[float]]`): mean over prompts for each sampling seed, by measure.
        corpus (`dict[str, float]`): measures over all outputs together.
        buckets (`list[dict]`): the measures by length of the first reference: `low` and `high` (tokens, None for no
            limit), `prompts` and `summary`. Empty buckets are left out.
        exposure_bias ([`ExposureBias`], *optional*): if requested with `exposure_bias_samples`.
        calibration ([`Calibration`], *optional*): from [`classify_model`].
    """

    summary: dict[str, MeanInterval]
    per_prompt: list[dict[str, float]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    by_seed: dict[str, list[float]]
    corpus: dict[str, float] = field(default_factory=dict)
    buckets: list[dict[str, Any]] = field(default_factory=list)
    exposure_bias: ExposureBias | None = None
    calibration: Calibration | None = None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    seeds: Sequence[int] | None,
    max_new_tokens: int,
    temperature: float = 1.0,
    no_repeat_ngram_size: int = 0,
    batch_size: int = 64,
    teacher: PreTrainedModel | None = None,
    teacher_temperature: float | None = None,
    forward_kl: bool = False,
    loss: bool = True,
    shared: SharedMeasures | None = None,
    exposure_bias_samples: int = 0,
    eos_tokens: Sequence[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    parts: Parts | None = None,
    progress: bool = True,
) -> Evaluation:
    """Sample from `model` alone, once per prompt and seed, and score the completions.

    Processes share the prompts; the result does not depend on their number. `docs/evaluation_measures.md` explains the
    measures: `length`, `eos_rate`, `repeated_4grams` and, for samples, `entropy_per_token`; with references `rouge_l`,
    `exact_match` and `loss`; with several seeds `best_rouge_l`, `distinct_outputs`, `distinct_4grams` and `self_bleu`;
    with a teacher `reverse_kl` and, with `forward_kl=True`, `forward_kl`, both also `_per_token`. Greedy decoding is a
    distribution on one completion y: with a teacher its `entropy_per_token` is 0 and its `reverse_kl` is -log p(y).

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to evaluate; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer, shared with the teacher.
        dataset ([`~datasets.Dataset`]): one row per prompt, with columns `prompt` and, for Rouge-L, exact match and
            loss, `references`.
        seeds (`Sequence[int]`, *optional*): sampling seeds. None decodes greedily, once.
        max_new_tokens (`int`): length limit.
        temperature (`float`, *optional*, defaults to `1.0`): sampling temperature.
        no_repeat_ngram_size (`int`, *optional*, defaults to `0`): block n-grams of this size from repeating, see
            [`NgramBlock`]; 0 for no block. The original code uses 6. With a block, completions are not samples of the
            model itself, so `reverse_kl` is a biased estimate.
        batch_size (`int`, *optional*, defaults to `64`): prompts decoded together; the result does not depend on it.
        teacher ([`~transformers.PreTrainedModel`], *optional*): for the divergences.
        teacher_temperature (`float`, *optional*): temperature of the teacher in `reverse_kl` and `forward_kl`. None
            means `temperature`. Below temperature 1, pass 1 to compare with the teacher as it is.
        forward_kl (`bool`, *optional*, defaults to `False`): also sample from the teacher, once per prompt and
            seed, to measure `forward_kl`.
        loss (`bool`, *optional*, defaults to `True`): whether to measure the references' `loss`, which takes a forward
            pass over prompts and references.
        shared ([`SharedMeasures`], *optional*): what does not depend on the temperature. Pass the same object to
            evaluations that differ only in `temperature` or greedy decoding, so that it is measured once.
        exposure_bias_samples (`int`, *optional*, defaults to `0`): samples per prompt from model and teacher to
            measure `exposure_bias`, drawn with the first seed and without n-gram block; 0 to skip. The paper uses 10.
        eos_tokens, chat_template_kwargs (*optional*): see [`generate_completions`].
        parts ([`Parts`], *optional*): stores finished parts, such as one seed's results, and returns them after
            a restart.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`Evaluation`].

    Raises:
        ValueError: if the dataset or the seeds are empty, `forward_kl` or exposure bias lacks a teacher or seeds, or
            teacher and tokenizer do not match.
    """
    _check_request(len(dataset), seeds, teacher, forward_kl, exposure_bias_samples)
    decoding = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
        "eos_tokens": eos_tokens,
        "chat_template_kwargs": chat_template_kwargs,
    }
    if teacher_temperature is None:
        teacher_temperature = temperature
    task = TaskMeasures(
        model, teacher, tokenizer, dataset, decoding, teacher_temperature, no_repeat_ngram_size, shared
    )
    runs: list[int | None] = [None] if seeds is None else list(seeds)
    records = _measure_runs(task, runs, teacher if forward_kl else None, parts, progress)
    losses = None if task.references is None or not loss else _kept(parts, "loss", task.measure_losses)
    exposure_bias = None
    if teacher is not None and exposure_bias_samples:
        measure_errors = partial(task.measure_errors, teacher, exposure_bias_samples, runs[0], progress)
        exposure_bias = excess_accumulated_error(*_kept(parts, "exposure_bias", measure_errors))
    settings = {
        "seeds": [seed for seed in runs if seed is not None],
        "greedy": seeds is None,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "max_new_tokens": max_new_tokens,
        "prompts": len(dataset),
        "exposure_bias_samples": exposure_bias_samples,
    }
    return replace(_summarize(task, records, losses, settings), exposure_bias=exposure_bias)


def _check_request(
    prompts: int,
    seeds: Sequence[int] | None,
    teacher: PreTrainedModel | None,
    forward_kl: bool,
    exposure_bias_samples: int,
) -> None:
    if prompts == 0 or (seeds is not None and len(seeds) == 0):
        raise UserError(f"Nothing to evaluate: {prompts} prompts and {len(seeds or ())} seeds.")
    if teacher is None and (forward_kl or exposure_bias_samples):
        raise UserError("forward_kl and exposure_bias_samples need a teacher.")
    if seeds is None and (forward_kl or exposure_bias_samples):
        raise UserError(
            "forward_kl and exposure_bias_samples compare distributions, and seeds=None decodes greedily. Give seeds, "
            "or leave them out."
        )


def _measure_runs(
    task: TaskMeasures,
    runs: list[int | None],
    forward_kl_teacher: PreTrainedModel | None,
    parts: Parts | None,
    progress: bool,
) -> list[list[dict[str, Any]]]:
    """Return `output` and `scores` by run and prompt. A run is a sampling seed, or None for greedy decoding."""
    records: list[list[dict[str, Any]]] = []
    total = len(task.prompts) * len(runs) * (1 if forward_kl_teacher is None else 2)
    with tqdm(total=total, desc="Evaluating", unit=" samples", disable=not progress) as bar:
        for seed in runs:
            name = "greedy" if seed is None else f"seed-{seed}"
            record = _kept(parts, name, partial(task.measure_samples, seed, bar))
            if forward_kl_teacher is not None:
                measure = partial(task.measure_forward_kl, forward_kl_teacher, seed, bar)
                forward_scores = _kept(parts, f"forward_kl-{seed}", measure)
                record = [
                    {**row, "scores": {**row["scores"], **scores}}
                    for row, scores in zip(record, forward_scores, strict=True)
                ]
            records.append(record)
            bar.update(total * len(records) // len(runs) - bar.n)  # a part read from disk did not move the bar
    return records


def _kept(parts: Parts | None, name: str, compute: Callable[[], Any]) -> Any:
    """Return the stored part, or compute and store it.

    `compute` gathers over processes, so a part is written after all of them have looked for it, and they agree.
    """
    if parts is None:
        return compute()
    if (part := parts.get(name)) is None:
        part = compute()
        if PartialState().is_main_process:
            parts.put(name, part)
    return part


def _summarize(
    task: TaskMeasures, records: list[list[dict[str, Any]]], losses: list[float] | None, settings: dict[str, Any]
) -> Evaluation:
    per_prompt, samples = [], []
    for row, prompt in enumerate(task.prompts):
        outputs = [record[row]["output"] for record in records]
        names = records[0][row]["scores"]
        scores = {name: [record[row]["scores"][name] for record in records] for name in names}
        values = {name: sum(by_run) / len(by_run) for name, by_run in scores.items()}
        if len(outputs) > 1:
            values["distinct_outputs"] = distinct_outputs(outputs)
            values["distinct_4grams"] = distinct_ngrams(outputs, NGRAM)
            values["self_bleu"] = self_bleu(outputs)
            if "rouge_l" in scores:
                values["best_rouge_l"] = max(scores["rouge_l"])
        if losses is not None:
            values["loss"] = losses[row]
        per_prompt.append(values)
        references = [] if task.references is None else task.references[row]
        samples.append({"prompt": prompt, "references": references, "outputs": outputs, "scores": scores})
    by_seed = {
        name: [sum(row["scores"][name] for row in record) / len(record) for record in records]
        for name in records[0][0]["scores"]
    }
    outputs = [output for sample in samples for output in sample["outputs"]]
    corpus = {"distinct_4grams": distinct_ngrams(outputs, NGRAM)}
    return Evaluation(
        summarize_prompts(per_prompt), per_prompt, samples, settings, by_seed, corpus, _buckets(task, per_prompt)
    )


def summarize_prompts(per_prompt: list[dict[str, float]]) -> dict[str, MeanInterval]:
    """Return mean and interval over prompts for each measure."""
    return {name: bootstrap_interval([row[name] for row in per_prompt]) for name in per_prompt[0]}


def _buckets(task: TaskMeasures, per_prompt: list[dict[str, float]]) -> list[dict[str, Any]]:
    if task.references is None:
        return []
    lengths = task.reference_lengths()
    buckets = []
    for low, high in BUCKETS:
        rows = [
            values
            for length, values in zip(lengths, per_prompt, strict=True)
            if low <= length and (high is None or length <= high)
        ]
        if rows:
            summary = {name: interval._asdict() for name, interval in summarize_prompts(rows).items()}
            buckets.append({"low": low, "high": high, "prompts": len(rows), "summary": summary})
    return buckets
