"""Evaluate a model on prompts with references: several sampling seeds, intervals over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..teacher import shared_vocab_size
from .divergence import completion_reverse_kl
from .generation import encode_prompts, generate_completions
from .metrics import MeanInterval, bootstrap_interval, distinct_outputs, repeated_ngrams, rouge_l


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate_model`] measured.

    Attributes:
        summary (`dict[str, MeanInterval]`): mean over prompts with a bootstrap interval, by measure.
        per_prompt (`list[dict[str, float]]`): each measure for each prompt, mean over the sampling seeds.
        samples (`list[dict]`): `prompt`, `references` and the `outputs` of all seeds.
        settings (`dict`): seeds, temperature, length limit, number of prompts.
    """

    summary: dict[str, MeanInterval]
    per_prompt: list[dict[str, float]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    teacher: PreTrainedModel | None = None,
    progress: bool = True,
) -> Evaluation:
    """Sample from `model` alone, once a prompt and seed, and measure the completions.

    Measures: `rouge_l` (maximum over references, in [0, 100]; where the dataset has references), `length` (tokens, the
    end-of-sequence token included), `eos_rate`, `repeated_4grams`, `distinct_outputs` (share of different texts among
    the seeds) and, with a teacher, `reverse_kl` (nats a completion, see [`completion_reverse_kl`]).

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to evaluate; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer (and the teacher's).
        dataset ([`~datasets.Dataset`]): with columns `prompt` and, for Rouge-L, `references`; one row a prompt.
        seeds (`Sequence[int]`): sampling seeds.
        max_new_tokens (`int`): length limit.
        temperature (`float`, *optional*, defaults to `1.0`): sampling temperature.
        batch_size (`int`, *optional*, defaults to `64`): prompts decoded together; the result does not depend on it.
        teacher ([`~transformers.PreTrainedModel`], *optional*): for `reverse_kl`.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`Evaluation`].

    Raises:
        ValueError: if the dataset or the seeds are empty, or teacher and tokenizer do not fit.
    """
    if len(dataset) == 0 or len(seeds) == 0:
        raise ValueError(f"Nothing to evaluate: {len(dataset)} prompts and {len(seeds)} seeds.")
    prompts = dataset["prompt"][:]
    references = dataset["references"][:] if "references" in dataset.column_names else None
    prompt_ids = encode_prompts(tokenizer, prompts)
    values: list[dict[str, list[float]]] = [{} for _ in prompts]
    outputs: list[list[str]] = [[] for _ in prompts]
    for seed in tqdm(seeds, desc="Evaluating", unit=" seeds", disable=not progress):
        completions = generate_completions(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )
        kl = None
        if teacher is not None:
            kl = completion_reverse_kl(
                model,
                teacher.eval(),
                prompt_ids,
                [completion.token_ids for completion in completions],
                vocab_size=shared_vocab_size(model, teacher, tokenizer),
                temperature=temperature,
                batch_size=batch_size,
            )
        for row, completion in enumerate(completions):
            measured = {
                "length": len(completion.token_ids),
                "eos_rate": float(completion.finished),
                "repeated_4grams": repeated_ngrams(completion.token_ids, 4),
            }
            if references is not None:
                measured["rouge_l"] = rouge_l(completion.text, references[row])
            if kl is not None:
                measured["reverse_kl"] = kl[row]
            for name, value in measured.items():
                values[row].setdefault(name, []).append(value)
            outputs[row].append(completion.text)
    per_prompt = [
        {name: sum(each) / len(each) for name, each in row.items()} | {"distinct_outputs": distinct_outputs(texts)}
        for row, texts in zip(values, outputs, strict=True)
    ]
    samples = [
        {"prompt": prompt, "references": [] if references is None else references[row], "outputs": outputs[row]}
        for row, prompt in enumerate(prompts)
    ]
    settings = {
        "seeds": list(seeds),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "prompts": len(prompts),
    }
    summary = {name: bootstrap_interval([row[name] for row in per_prompt]) for name in per_prompt[0]}
    return Evaluation(summary, per_prompt, samples, settings)
