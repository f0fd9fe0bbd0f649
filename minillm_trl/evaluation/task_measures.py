"""Sample completions for the prompts of one dataset and score them, shared among processes."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.templates import make_completion
from ..errors import UserError
from ..models.context import max_context
from ..models.encoding import Prompt, encode_pair, encode_prompts
from ..models.lm_head import check_embedded
from ..models.teacher import shared_vocab_size
from ..rollouts.prompts import Completion, generate_completions
from .divergence import completion_losses, score_completions, token_divergences
from .exposure_bias import sample_divergences
from .metrics import exact_match, repeated_ngrams, rouge_l

NGRAM = 4  # of `repeated_4grams` and `distinct_4grams`


@dataclass
class SharedMeasures:
    """What evaluations of one model on the same prompts share, at any temperature: filled by the first of them.

    Attributes:
        teacher_samples (`dict`): the teacher's completions, by seed and the teacher's temperature.
        losses (`list[float]`, *optional*): the loss of the references, by prompt.
    """

    teacher_samples: dict[tuple[int | None, float], list[Completion]] = field(default_factory=dict)
    losses: list[float] | None = None


class TaskMeasures:
    """Samples and scores of one model on the prompts of one dataset.

    Processes share the prompts: process i of n measures rows i, i + n, i + 2n, ... Every process gets all results.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to evaluate.
        teacher ([`~transformers.PreTrainedModel`], *optional*): for `reverse_kl` on the model's samples.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): tokenizer of both models.
        dataset ([`~datasets.Dataset`]): columns `prompt` and, optionally, `references`.
        decoding (`dict`): the arguments that [`generate_completions`] and [`sample_divergences`] share.
        teacher_temperature (`float`): temperature of the teacher in `reverse_kl` and `forward_kl`.
        no_repeat_ngram_size (`int`): see [`NgramBlock`]; 0 for no block.
        shared ([`SharedMeasures`], *optional*): of earlier evaluations of the same model, teacher and prompts.

    Raises:
        ValueError: if a prompt fills the model's context or has an empty list of references, or the model has no
            embedding for a token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        decoding: dict[str, Any],
        teacher_temperature: float,
        no_repeat_ngram_size: int,
        shared: SharedMeasures | None = None,
    ):
        self.model, self.teacher, self.tokenizer = model, teacher, tokenizer
        self.decoding, self.no_repeat_ngram_size = decoding, no_repeat_ngram_size
        self.teacher_temperature = teacher_temperature
        self.shared = shared or SharedMeasures()
        self.prompts = dataset["prompt"][:]
        self.references: list[list[str]] | None = (
            dataset["references"][:] if "references" in dataset.column_names else None
        )
        self.prompt_ids = encode_prompts(tokenizer, self.prompts, decoding["chat_template_kwargs"])
        self._check_rows()
        # For each prompt, (context, learnt) token ids of its references, encoded as in training
        self.pairs = [
            [self._encode_reference(prompt, reference) for reference in references]
            for prompt, references in zip(self.prompts, self.references or (), strict=self.references is not None)
        ]
        check_embedded(model, [*self.prompt_ids, *(ids for row in self.pairs for pair in row for ids in pair)])
        self.rows = own_rows(len(self.prompts))

    def _check_rows(self) -> None:
        """Check that every prompt leaves room in the model's context and has a reference, before hours of sampling."""
        limit = max_context(self.model)
        for row, ids in enumerate(self.prompt_ids):
            if limit is not None and len(ids) >= limit:
                raise UserError(
                    f"Prompt {row} has {len(ids)} tokens, which leave no room for an answer in the model's context of "
                    f"{limit}. Shorten or drop it."
                )
            if self.references is not None and not self.references[row]:
                raise UserError(f"Prompt {row} has no reference. Give it one, or drop the column `references`.")

    def measure_samples(self, seed: int | None, bar: tqdm) -> list[dict[str, Any]]:
        """Return the output and scores for each prompt, sampled with `seed`; None decodes greedily."""
        completions = self._sample(self.model, self.decoding["temperature"], seed, bar)
        records: list[dict[str, Any]] = [
            {"output": completion.text, "scores": self._text_scores(row, completion)}
            for row, completion in zip(self.rows, completions, strict=True)
        ]
        distribution_scores = self._distribution_scores if seed is not None else self._point_scores
        for record, scores in zip(records, distribution_scores(completions), strict=True):
            record["scores"] |= scores
        return gather_rows(records, len(self.prompts))

    def _distribution_scores(self, completions: list[Completion]) -> list[dict[str, float]]:
        """Return the entropy per token and, with a teacher, the reverse KL of each completion."""
        scores = score_completions(
            self.model.eval(),
            None if self.teacher is None else self.teacher.eval(),
            [self.prompt_ids[row] for row in self.rows],
            [completion.token_ids for completion in completions],
            vocab_size=self._sampled_rows(self.teacher),
            temperature=self.decoding["temperature"],
            second_temperature=self.teacher_temperature,
            batch_size=self.decoding["batch_size"],
        )
        by_completion = [{"entropy_per_token": sum(values) / len(values)} for values in scores.entropy]
        for found, values in zip(by_completion, scores.divergence or (), strict=scores.divergence is not None):
            found |= _sum_and_mean("reverse_kl", values)
        return by_completion

    def _point_scores(self, completions: list[Completion]) -> list[dict[str, float]]:
        """Return entropy and reverse KL of greedy decoding, which puts all probability on one completion.

        The divergence of a point mass is -log p(y) of its completion. Nothing without a teacher.
        """
        if self.teacher is None:
            return [{} for _ in completions]
        losses = completion_losses(
            self.teacher.eval(),
            [self.prompt_ids[row] for row in self.rows],
            [completion.token_ids for completion in completions],
            vocab_size=self._sampled_rows(self.teacher),
            temperature=self.teacher_temperature,
            batch_size=self.decoding["batch_size"],
        )
        return [{"entropy_per_token": 0.0, **_sum_and_mean("reverse_kl", values)} for values in losses]

    def measure_forward_kl(self, teacher: PreTrainedModel, seed: int | None, bar: tqdm) -> list[dict[str, float]]:
        """Return KL(p || q) for each prompt, on a completion sampled from the teacher."""
        samples = self.shared.teacher_samples
        key = seed, self.teacher_temperature
        if key not in samples:
            samples[key] = self._sample(teacher, self.teacher_temperature, seed, bar)
        completions = samples[key]
        divergences = token_divergences(
            teacher.eval(),
            self.model.eval(),
            [self.prompt_ids[row] for row in self.rows],
            [completion.token_ids for completion in completions],
            vocab_size=self._sampled_rows(teacher),
            temperature=self.teacher_temperature,
            second_temperature=self.decoding["temperature"],
            batch_size=self.decoding["batch_size"],
        )
        return gather_rows([_sum_and_mean("forward_kl", values) for values in divergences], len(self.prompts))

    def measure_losses(self) -> list[float]:
        """Return the mean negative log-prob per token of each prompt's references, end tokens included.

        References are truncated to the model's context.
        """
        if self.shared.losses is not None:
            return self.shared.losses
        limit = max_context(self.model)
        rows = [row for row in self.rows for _ in self.pairs[row]]
        pairs = [pair for row in self.rows for pair in self.pairs[row]]
        values = completion_losses(
            self.model.eval(),
            [context for context, _ in pairs],
            [learnt[: None if limit is None else limit - len(context)] for context, learnt in pairs],
            batch_size=self.decoding["batch_size"],
        )
        by_row: dict[int, list[float]] = {row: [] for row in self.rows}
        for row, losses in zip(rows, values, strict=True):
            by_row[row] += losses
        means = [sum(losses) / len(losses) for losses in by_row.values()]
        self.shared.losses = gather_rows(means, len(self.prompts))
        return self.shared.losses

    def measure_errors(
        self, teacher: PreTrainedModel, samples: int, seed: int | None, progress: bool
    ) -> list[list[list[float]]]:
        """Return the student's errors at each token of samples from the student, and of samples from the teacher."""
        errors_by_model = sample_divergences(
            self.model,
            teacher,
            self.tokenizer,
            [self.prompts[row] for row in self.rows],
            samples=samples,
            seed=seed,
            progress=progress,
            **self.decoding,
        )
        gathered = []
        for errors in errors_by_model:
            by_prompt = [errors[i : i + samples] for i in range(0, len(errors), samples)]
            gathered.append(list(chain.from_iterable(gather_rows(by_prompt, len(self.prompts)))))
        return gathered

    def _encode_reference(self, prompt: Prompt, reference: str) -> tuple[list[int], list[int]]:
        completion = reference if isinstance(prompt, str) else make_completion(reference, "chat")
        return encode_pair(self.tokenizer, prompt, completion, self.decoding["chat_template_kwargs"])

    def reference_lengths(self) -> list[int]:
        """Return the number of tokens in each prompt's first reference; empty without references."""
        return [
            len(self.tokenizer(references[0].strip(), add_special_tokens=False)["input_ids"])
            for references in self.references or ()
        ]

    def _sample(self, model: PreTrainedModel, temperature: float, seed: int | None, bar: tqdm) -> list[Completion]:
        processes = PartialState().num_processes
        return generate_completions(
            model,
            self.tokenizer,
            [self.prompts[row] for row in self.rows],
            indices=self.rows,
            seed=seed,
            greedy=seed is None,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            on_batch=lambda count: bar.update(count * processes),
            **{**self.decoding, "temperature": temperature},
        )

    def _sampled_rows(self, teacher: PreTrainedModel | None) -> int:
        """Return the number of leading vocabulary rows that samples are drawn from, without padding."""
        if teacher is not None:
            return min(len(self.tokenizer), shared_vocab_size(self.model, teacher, self.tokenizer))
        return min(len(self.tokenizer), self.model.get_output_embeddings().weight.shape[0])

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


def _sum_and_mean(name: str, values: list[float]) -> dict[str, float]:
    return {name: sum(values), f"{name}_per_token": sum(values) / len(values)}


def own_rows(total: int) -> range:
    """Return the rows of this process: every n-th row for n processes, starting at its index."""
    state = PartialState()
    return range(state.process_index, total, state.num_processes)


def gather_rows(values: list[Any], total: int) -> list[Any]:
    """Return the values for all rows, in row order, on every process.

    Args:
        values (`list`): values for [`own_rows`] of this process.
        total (`int`): number of rows of all processes.
    """
    gathered: list[Any] = [None] * total
    for process, part in enumerate(gather_object([values])):
        gathered[process :: PartialState().num_processes] = part
    return gathered
