"""Evaluate a model on prompts with references: several sampling seeds, intervals over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.templates import make_completion
from ..errors import UserError
from ..models.encoding import Prompt, encode_pair, encode_prompts
from ..models.lm_head import check_embedded
from ..models.teacher import max_context, shared_vocab_size
from ..rollouts.prompts import Completion, generate_completions
from .calibration import Calibration
from .divergence import completion_losses, token_divergences
from .exposure_bias import ExposureBias, excess_accumulated_error, sample_divergences
from .metrics import (
    MeanInterval,
    bootstrap_interval,
    distinct_ngrams,
    distinct_outputs,
    exact_match,
    repeated_ngrams,
    rouge_l,
    self_bleu,
)
from .parts import Parts

NGRAM = 4
# Lengths of the first reference in tokens, as the paper cuts S-NI and UnNI (its Figures 7 and 15)
BUCKETS = ((0, 5), (6, 10), (11, None))


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate_model`] measured.

    Attributes:
        summary (`dict[str, MeanInterval]`): mean over prompts with a bootstrap interval, by measure.
        per_prompt (`list[dict[str, float]]`): each measure for each prompt, mean over the sampling seeds.
        samples (`list[dict]`): `prompt`, `references`, the `outputs` of all seeds, and their `scores` by measure.
        settings (`dict`): how it was sampled, and the number of prompts.
        by_seed (`dict[str, list[float]]`): mean over prompts for each sampling seed, by measure.
        corpus (`dict[str, float]`): measures of all outputs together.
        buckets (`list[dict]`): `low`, `high` (None for no limit), `prompts` and `summary` of the prompts whose first
            reference has that many tokens; those with prompts.
        exposure_bias ([`ExposureBias`], *optional*): if it was asked for.
        calibration ([`Calibration`], *optional*): of a classification, see [`classify_model`].
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
    forward_kl: bool = False,
    exposure_bias_samples: int = 0,
    eos_tokens: Sequence[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    parts: Parts | None = None,
    progress: bool = True,
) -> Evaluation:
    """Sample from `model` alone, once a prompt and seed, and measure the completions.

    Several processes, if there are, share the prompts; the result does not depend on their number. Measures, which
    `docs/evaluation.md` explains: `rouge_l`, `exact_match` and `loss` where the dataset has references, `length`,
    `eos_rate`, `repeated_4grams`, with several seeds `distinct_outputs`, `distinct_4grams` and `self_bleu`, and with a
    teacher `reverse_kl` and, if asked for, `forward_kl`, both also `_per_token`.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to evaluate; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer (and the teacher's).
        dataset ([`~datasets.Dataset`]): with columns `prompt` and, for Rouge-L, `references`; one row a prompt.
        seeds (`Sequence[int]`, *optional*): sampling seeds. None decodes greedily, once.
        max_new_tokens (`int`): length limit.
        temperature (`float`, *optional*, defaults to `1.0`): sampling temperature.
        no_repeat_ngram_size (`int`, *optional*, defaults to `0`): n for which no completion may repeat an n-gram, see
            [`NgramBlock`]; 0 for none. The original code has 6. Completions are then no samples of the model itself,
            so that `reverse_kl` along them is no longer an unbiased estimate.
        batch_size (`int`, *optional*, defaults to `64`): prompts decoded together; the result does not depend on it.
        teacher ([`~transformers.PreTrainedModel`], *optional*): for the divergences.
        forward_kl (`bool`, *optional*, defaults to `False`): sample from the teacher too, once a prompt and seed, for
            `forward_kl`.
        exposure_bias_samples (`int`, *optional*, defaults to `0`): samples of model and teacher for each prompt, with
            which `exposure_bias` is measured, drawn with the first of the seeds; 0 leaves it out. The paper has 10.
            N-grams are not blocked in them.
        eos_tokens, chat_template_kwargs (*optional*): see [`generate_completions`].
        parts ([`Parts`], *optional*): where each seed's results are kept as soon as they are there, and taken from.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`Evaluation`].

    Raises:
        ValueError: if the dataset or the seeds are empty, a teacher is given without seeds, or teacher and tokenizer
            do not fit.
    """
    if len(dataset) == 0 or (seeds is not None and len(seeds) == 0):
        raise UserError(f"Nothing to evaluate: {len(dataset)} prompts and {len(seeds or ())} seeds.")
    if seeds is None and teacher is not None:
        raise UserError("Divergences are measured on samples: give seeds, or no teacher.")
    if teacher is None and (forward_kl or exposure_bias_samples):
        raise UserError("forward_kl and exposure_bias_samples need a teacher.")
    decoding = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
        "eos_tokens": eos_tokens,
        "chat_template_kwargs": chat_template_kwargs,
    }
    task = _Task(model, teacher, tokenizer, dataset, decoding, no_repeat_ngram_size)
    runs: list[int | None] = [None] if seeds is None else list(seeds)
    records = []
    total = len(dataset) * len(runs) * (2 if forward_kl else 1)
    with tqdm(total=total, desc="Evaluating", unit=" samples", disable=not progress) as bar:
        for seed in runs:
            name = "greedy" if seed is None else f"seed-{seed}"
            record = _kept(parts, name, lambda seed=seed: task.measure_samples(seed, bar))
            if forward_kl:
                more = _kept(parts, f"forward_kl-{seed}", lambda seed=seed: task.measure_forward_kl(seed, bar))
                record = [{**a, "scores": {**a["scores"], **b}} for a, b in zip(record, more, strict=True)]
            records.append(record)
            bar.update(total * len(records) // len(runs) - bar.n)  # parts that were there
    losses = None
    if task.references is not None:
        losses = _kept(parts, "loss", task.measure_losses)
    exposure_bias = None
    if exposure_bias_samples:
        errors = _kept(parts, "exposure_bias", lambda: task.measure_errors(exposure_bias_samples, runs[0], progress))
        exposure_bias = excess_accumulated_error(*errors)
    settings = {
        "seeds": [seed for seed in runs if seed is not None],
        "greedy": seeds is None,
        "temperature": temperature,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "max_new_tokens": max_new_tokens,
        "prompts": len(dataset),
        "exposure_bias_samples": exposure_bias_samples,
    }
    return replace(_summarize(task, records, losses, settings), exposure_bias=exposure_bias)


class _Task:
    """Model, teacher and prompts, of which this process takes every n-th."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        decoding: dict[str, Any],
        no_repeat_ngram_size: int,
    ):
        self.model, self.teacher, self.tokenizer = model, teacher, tokenizer
        self.decoding, self.no_repeat_ngram_size = decoding, no_repeat_ngram_size
        self.prompts = dataset["prompt"][:]
        self.references = dataset["references"][:] if "references" in dataset.column_names else None
        self.prompt_ids = encode_prompts(tokenizer, self.prompts, decoding["chat_template_kwargs"])
        # of each prompt, its references as training encodes them: the context, and what is learnt
        self.pairs = [
            [self._encode_reference(prompt, each) for each in references]
            for prompt, references in zip(self.prompts, self.references or (), strict=self.references is not None)
        ]
        # before hours of sampling
        check_embedded(model, [*self.prompt_ids, *(ids for row in self.pairs for pair in row for ids in pair)])
        self.rows = own_rows(len(self.prompts))

    def measure_samples(self, seed: int | None, bar: tqdm) -> list[dict[str, Any]]:
        """Output and scores of all prompts, of all processes."""
        completions = self._sample(self.model, seed, bar)
        records = [
            {"output": each.text, "scores": self._text_scores(row, each)}
            for row, each in zip(self.rows, completions, strict=True)
        ]
        if self.teacher is not None:
            divergences = self._divergences(self.model, self.teacher, completions)
            for record, each in zip(records, divergences, strict=True):
                record["scores"] |= _sum_and_mean("reverse_kl", each)
        return gather_rows(records, len(self.prompts))

    def measure_forward_kl(self, seed: int, bar: tqdm) -> list[dict[str, float]]:
        """The same of KL(p || q), on the teacher's completions."""
        completions = self._sample(self.teacher, seed, bar)
        divergences = self._divergences(self.teacher, self.model, completions)
        return gather_rows([_sum_and_mean("forward_kl", each) for each in divergences], len(self.prompts))

    def measure_losses(self) -> list[float]:
        """Of each prompt, the negative log-prob of its references and their ends, mean over their tokens.

        References are cut where the model's context ends.
        """
        limit = max_context(self.model)
        rows = [row for row in self.rows for _ in self.pairs[row]]
        pairs = [pair for row in self.rows for pair in self.pairs[row]]
        values = completion_losses(
            self.model,
            [context for context, _ in pairs],
            [learnt[: None if limit is None else max(limit - len(context), 0)] for context, learnt in pairs],
            batch_size=self.decoding["batch_size"],
        )
        by_row: dict[int, list[float]] = {row: [] for row in self.rows}
        for row, losses in zip(rows, values, strict=True):
            by_row[row] += losses
        return gather_rows([sum(losses) / len(losses) for losses in by_row.values()], len(self.prompts))

    def measure_errors(self, samples: int, seed: int, progress: bool) -> list[list[list[float]]]:
        """The student's errors at each token of samples of the student, and of the teacher."""
        mine = sample_divergences(
            self.model,
            self.teacher,
            self.tokenizer,
            [self.prompts[row] for row in self.rows],
            samples=samples,
            seed=seed,
            progress=progress,
            **self.decoding,
        )
        by_prompt = [[each[i : i + samples] for i in range(0, len(each), samples)] for each in mine]
        gathered = [gather_rows(each, len(self.prompts)) for each in by_prompt]
        return [[errors for prompt in each for errors in prompt] for each in gathered]

    def _encode_reference(self, prompt: Prompt, reference: str) -> tuple[list[int], list[int]]:
        completion = reference if isinstance(prompt, str) else make_completion(reference, "chat")
        return encode_pair(self.tokenizer, prompt, completion, self.decoding["chat_template_kwargs"])

    def reference_length(self, row: int) -> int:
        """Tokens of the first reference."""
        return len(self.tokenizer(self.references[row][0].strip(), add_special_tokens=False)["input_ids"])

    def _sample(self, model: PreTrainedModel, seed: int | None, bar: tqdm) -> list[Completion]:
        processes = PartialState().num_processes
        return generate_completions(
            model,
            self.tokenizer,
            [self.prompts[row] for row in self.rows],
            indices=self.rows,
            seed=seed or 0,
            greedy=seed is None,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            on_batch=lambda count: bar.update(count * processes),
            **self.decoding,
        )

    def _text_scores(self, row: int, completion: Completion) -> dict[str, float]:
        scores = {
            "length": len(completion.token_ids),
            "eos_rate": float(completion.finished),
            "repeated_4grams": repeated_ngrams(completion.token_ids, NGRAM),
        }
        if self.references is not None:
            scores["rouge_l"] = rouge_l(completion.text, self.references[row])
            scores["exact_match"] = exact_match(completion.text, self.references[row])
        return scores

    def _divergences(
        self, first: PreTrainedModel, second: PreTrainedModel, completions: list[Completion]
    ) -> list[list[float]]:
        return token_divergences(
            first.eval(),
            second.eval(),
            [self.prompt_ids[row] for row in self.rows],
            [completion.token_ids for completion in completions],
            vocab_size=shared_vocab_size(self.model, self.teacher, self.tokenizer),
            temperature=self.decoding["temperature"],
            batch_size=self.decoding["batch_size"],
        )


def _sum_and_mean(name: str, values: list[float]) -> dict[str, float]:
    return {name: sum(values), f"{name}_per_token": sum(values) / len(values)}


def own_rows(total: int) -> range:
    """The rows of this process: every n-th."""
    state = PartialState()
    return range(state.process_index, total, state.num_processes)


def gather_rows(values: list[Any], total: int) -> list[Any]:
    """The values of all processes' rows in the order of the rows, on each of them."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    gathered: list[Any] = [None] * total
    for process, part in enumerate(gather_object([values])):
        gathered[process :: state.num_processes] = part
    return gathered


def _kept(parts: Parts | None, name: str, compute: Any) -> Any:
    """A part that is there, or the computed one, which is kept.

    A part is written only once all processes have computed their share of it, so all of them find the same.
    """
    if parts is None:
        return compute()
    if (found := parts.get(name)) is None:
        found = compute()
        if PartialState().is_main_process:
            parts.put(name, found)
    return found


def _summarize(
    task: _Task, records: list[list[dict[str, Any]]], losses: list[float] | None, settings: dict[str, Any]
) -> Evaluation:
    per_prompt, samples = [], []
    for row, prompt in enumerate(task.prompts):
        outputs = [record[row]["output"] for record in records]
        names = records[0][row]["scores"]
        scores = {name: [record[row]["scores"][name] for record in records] for name in names}
        values = {name: sum(each) / len(each) for name, each in scores.items()}
        if len(outputs) > 1:
            values["distinct_outputs"] = distinct_outputs(outputs)
            values["distinct_4grams"] = distinct_ngrams(outputs, NGRAM)
            values["self_bleu"] = self_bleu(outputs)
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
    """Mean and interval of each measure over prompts."""
    return {name: bootstrap_interval([row[name] for row in per_prompt]) for name in per_prompt[0]}


def _buckets(task: _Task, per_prompt: list[dict[str, float]]) -> list[dict[str, Any]]:
    if task.references is None:
        return []
    lengths = [task.reference_length(row) for row in range(len(per_prompt))]
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
