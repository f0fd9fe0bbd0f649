"""Exposure bias: how much more error a student accumulates on its own text than on the teacher's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.encoding import Prompt, encode_prompts
from ..models.teacher import shared_vocab_size
from ..rollouts.keyed_random import draw_seed, evaluation_key
from ..rollouts.prompts import end_token_ids
from ..rollouts.sampling import Completions, sample_prompts
from .divergence import token_divergences


@dataclass(frozen=True)
class ExposureBias:
    """Accumulated errors by position l = 1, 2, ..., up to the last one that samples of both models reach.

    Attributes:
        student (`list[float]`): L(l), nats: accumulated error on contexts that the student sampled.
        teacher (`list[float]`): E(l) = l eps(l), nats: accumulated error on contexts that the teacher sampled.
        excess_error (`list[float | None]`): ExAccErr(l), per cent; None where E(l) is not positive.
        counts_student, counts_teacher (`list[int]`): number of samples with a token at position l, which its mean is
            taken over. With few samples the curves are noise.
    """

    student: list[float]
    teacher: list[float]
    excess_error: list[float | None]
    counts_student: list[int]
    counts_teacher: list[int]


def excess_accumulated_error(
    on_student: Sequence[Sequence[float]], on_teacher: Sequence[Sequence[float]]
) -> ExposureBias:
    r"""Return the excess accumulated error of a student (App. B.5 of the paper, after Arora et al. 2022).

    With the error of a step $\epsilon_t = \mathrm{KL}(p(\cdot|y_{<t}, x) \,\|\, q(\cdot|y_{<t}, x))$ of student q from
    teacher p,

    $$ L(l) = \sum_{t=1}^{l} \mathbb{E}_{y \sim q}[\epsilon_t], \qquad
       E(l) = l\,\epsilon(l) = \sum_{t=1}^{l} \mathbb{E}_{y \sim p}[\epsilon_t], \qquad
       \mathrm{ExAccErr}(l) = 100\, \frac{L(l) - E(l)}{E(l)} $$

    The mean at position t is over all samples that have a token there: it estimates the error of a step given that the
    text is that long. Finished samples do not count as zero error, which would reward a student for stopping early.

    Args:
        on_student, on_teacher (`Sequence[Sequence[float]]`): $\epsilon_t$, nats, for every token of every sample from
            the student and from the teacher (see [`~evaluation.divergence.token_divergences`]), in token order. Every
            prompt has the same number of samples.

    Returns:
        [`ExposureBias`]. `excess_error` is None where the student makes no error on the teacher's contexts, such as at
        every position for a student equal to its teacher.

    Raises:
        ValueError: if all samples of one of the models are empty.
    """
    positions = min(max(map(len, divergences), default=0) for divergences in (on_student, on_teacher))
    if positions == 0:
        raise ValueError("Exposure bias needs samples of student and teacher, with at least one token each.")
    student, counts_student = _accumulated(on_student, positions)
    teacher, counts_teacher = _accumulated(on_teacher, positions)
    excess = [
        100 * (mine - theirs) / theirs if theirs > 0 else None for mine, theirs in zip(student, teacher, strict=True)
    ]
    return ExposureBias(student, teacher, excess, counts_student, counts_teacher)


def _accumulated(divergences: Sequence[Sequence[float]], positions: int) -> tuple[list[float], list[int]]:
    by_position = [[errors[t] for errors in divergences if len(errors) > t] for t in range(positions)]
    # fsum is exact, so the result does not depend on the order of the prompts
    means = (math.fsum(errors) / len(errors) for errors in by_position)
    return list(accumulate(means)), [len(errors) for errors in by_position]


def sample_divergences(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    batch_size: int = 64,
    eos_tokens: Sequence[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> tuple[list[list[float]], list[list[float]]]:
    """Sample from student and teacher, and return the student's errors on both.

    A sample depends only on the seed, its prompt's tokens and its index, not on batches or the order of the prompts.
    Student and teacher draw with the same random numbers, which reduces the noise of their difference.

    Args:
        student, teacher ([`~transformers.PreTrainedModel`]): the two models; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): tokenizer of both.
        prompts (`Sequence`): texts or conversations, all different.
        samples (`int`): samples per model and prompt; the paper uses 10.
        max_new_tokens (`int`): length limit, including the end-of-sequence token.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of sampling and of both distributions.
        seed (`int`, *optional*): seed of the samples. None draws one from torch's generator.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass.
        eos_tokens, chat_template_kwargs (*optional*): see [`generate_completions`].
        progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

    Returns:
        The arguments of [`excess_accumulated_error`]: errors at each token of the student's samples, and of the
        teacher's samples. Samples for the same prompt are adjacent.

    Raises:
        ValueError: if `samples` is less than 1, or tokenizer and models do not match.
    """
    if samples < 1:
        raise ValueError(f"Exposure bias needs at least one sample of each prompt, got samples={samples}.")
    vocab_size = min(len(tokenizer), shared_vocab_size(student, teacher, tokenizer))
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = encode_prompts(tokenizer, prompts, chat_template_kwargs)
    prompt_ids = [ids for ids in encoded for _ in range(samples)]
    conversational = any(not isinstance(prompt, str) for prompt in prompts)
    seed = draw_seed() if seed is None else seed
    keys = [evaluation_key(seed, ids, number % samples) for number, ids in enumerate(prompt_ids)]
    # Samples come from the distributions that are scored, hence one set of options for both
    options: dict[str, Any] = {"vocab_size": vocab_size, "temperature": temperature, "batch_size": batch_size}
    divergences = []
    with tqdm(total=2 * len(keys), desc="Exposure bias", unit=" samples", disable=not progress) as bar:

        def advance(rows: list[int], _: Completions) -> None:
            bar.update(len(rows))

        for model in (student.eval(), teacher.eval()):
            completions = sample_prompts(
                model,
                prompt_ids,
                keys=keys,
                max_new_tokens=max_new_tokens,
                eos_token_ids=end_token_ids(model, tokenizer, conversational, eos_tokens, chat_template_kwargs),
                pad_token_id=pad_token_id,
                on_batch=advance,
                **options,
            )
            divergences.append(token_divergences(teacher, student, prompt_ids, completions, **options))
    on_student, on_teacher = divergences
    return on_student, on_teacher
