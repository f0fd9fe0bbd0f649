"""Score given completions token by token: entropy and KL divergence of two models, and the loss of one model."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.fused_head import ScoreRequest, score_hidden_states
from ..models.lm_head import LMHead, check_embedded, completion_hidden_states
from ..objectives import reverse_kl


class CompletionScores(NamedTuple):
    """Values in nats of each token of each completion; an empty list for an empty completion.

    Attributes:
        entropy (`list[list[float]]`): entropy of the first model's next-token distribution.
        divergence (`list[list[float]]`, *optional*): KL(first || second); None without a second model.
    """

    entropy: list[list[float]]
    divergence: list[list[float]] | None


@torch.no_grad()
def score_completions(
    first: PreTrainedModel,
    second: PreTrainedModel | None,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    second_temperature: float | None = None,
    batch_size: int = 64,
) -> CompletionScores:
    r"""Return the exact entropy of a model, and its KL divergence from another, at each token of completions.

    $$ H\big(f(\cdot|y_{<t}, x)\big), \qquad
       \mathrm{KL}\big(f(\cdot|y_{<t}, x) \,\|\, s(\cdot|y_{<t}, x)\big), \qquad t = 1, \dots, T $$

    With the student as `first` and the teacher as `second` the divergence is the reverse KL; swapped, it is the
    forward KL. On completions sampled from `first`, the mean over completions of the sum over tokens is an unbiased
    estimate of KL(first || second) over completions up to the length limit, with less variance than the log-ratio of
    the sampled tokens.

    Args:
        first, second ([`~transformers.PreTrainedModel`]): the models in eval mode, with the same tokenizer. Without
            `second`, only the entropy is computed.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        completion_ids (`Sequence[Sequence[int]]`): completions, including the end-of-sequence token.
        vocab_size (`int`): number of leading vocabulary rows that both models share.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of the first model's distribution.
        second_temperature (`float`, *optional*): temperature of the second model's distribution; None means
            `temperature`.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.

    Raises:
        ValueError: if a prompt has no tokens, or the number of prompts differs from the number of completions.
    """
    head = LMHead.of(first)
    second_head = None if second is None else LMHead.of(second)
    ratio = temperature / (second_temperature or temperature)

    def divergence_of(log_probs: torch.Tensor, second_log_probs: torch.Tensor) -> torch.Tensor:
        # Log-probs at one temperature are logits up to a constant, so they give the log-probs at any other
        return reverse_kl(log_probs, torch.log_softmax(second_log_probs * ratio, dim=-1))

    def score(request: ScoreRequest) -> list[torch.Tensor]:
        request = request._replace(temperature=temperature)
        if second is not None:
            request = request._replace(
                teacher_hidden_states=_states(second, request),
                divergence=reverse_kl if ratio == 1 else divergence_of,
            )
        scores = score_hidden_states(_states(first, request), head, request, vocab_size, second_head)
        return [scores.entropy] if scores.divergence is None else [scores.entropy, scores.divergence]

    names = ("entropy",) if second is None else ("entropy", "divergence")
    values = _token_values(names, score, prompt_ids, completion_ids, batch_size, head.weight.device)
    return CompletionScores(values["entropy"], values.get("divergence"))


def token_divergences(
    first: PreTrainedModel,
    second: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    second_temperature: float | None = None,
    batch_size: int = 64,
) -> list[list[float]]:
    """Return the divergences of [`score_completions`], which has the same arguments and errors."""
    scores = score_completions(
        first,
        second,
        prompt_ids,
        completion_ids,
        vocab_size=vocab_size,
        temperature=temperature,
        second_temperature=second_temperature,
        batch_size=batch_size,
    )
    assert scores.divergence is not None  # there is a second model
    return scores.divergence


@torch.no_grad()
def completion_losses(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[list[float]]:
    r"""Return the language-modelling loss of each token of completions: $-\log q(y_t|y_{<t}, x)$.

    It is also the divergence from q of a decoder that always writes this token, $\mathrm{KL}(\delta_{y_t} \,\|\, q)$.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model in eval mode.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        completion_ids (`Sequence[Sequence[int]]`): completions, with or without end-of-sequence token.
        vocab_size (`int`, *optional*): number of leading vocabulary rows of the softmax. None means the whole
            vocabulary, including padding rows, as in the loss of `transformers`.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of q.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.

    Returns:
        `list[list[float]]`: nats, one list per completion with one number per token.

    Raises:
        ValueError: if a prompt has no tokens, the number of prompts differs from the number of completions, or the
            model has no embedding for a token.
    """
    check_embedded(model, (*prompt_ids, *completion_ids))
    head = LMHead.of(model)
    rows = head.weight.shape[0] if vocab_size is None else vocab_size

    def losses(request: ScoreRequest) -> list[torch.Tensor]:
        request = request._replace(temperature=temperature)
        return [-score_hidden_states(_states(model, request), head, request, rows).logps]

    return _token_values(("loss",), losses, prompt_ids, completion_ids, batch_size, head.weight.device)["loss"]


def score_requests(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[list[int], ScoreRequest]]:
    """Yield batches of prompts with their completions, sorted by length to reduce padding, longest first.

    Yields:
        `tuple[list[int], ScoreRequest]`: row numbers of the batch, and its tokens with a mask on completion tokens.

    Raises:
        ValueError: if a prompt has no tokens, or the number of prompts differs from the number of completions.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"Every prompt needs one completion: got {len(prompt_ids)} prompts and {len(completion_ids)} completions."
        )
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompt_width = max(len(prompt_ids[row]) for row in rows)
        width = max(1, *(len(completion_ids[row]) for row in rows))
        ids = torch.zeros(len(rows), prompt_width + width, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            if len(prompt_ids[row]) == 0:
                raise UserError(
                    f"Prompt {row} has no tokens, so nothing predicts the first token of its completion. Drop it, or "
                    "start it with a beginning-of-sequence token."
                )
            tokens = [*prompt_ids[row], *completion_ids[row]]
            first = prompt_width - len(prompt_ids[row])  # left padding: completions start in the same column
            ids[i, first : first + len(tokens)] = torch.tensor(tokens)
            mask[i, first : first + len(tokens)] = True
        ids, mask = ids.to(device), mask.to(device)
        yield rows, ScoreRequest(ids, mask, mask[:, -width:])


def _states(model: PreTrainedModel, request: ScoreRequest) -> torch.Tensor:
    length = request.completion_mask.shape[1]
    return completion_hidden_states(model, request.input_ids, request.attention_mask, length)


def _token_values(
    names: Sequence[str],
    score: Callable[[ScoreRequest], list[torch.Tensor]],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
    device: torch.device,
) -> dict[str, list[list[float]]]:
    """Apply `score`, which returns a tensor `(B, T)` for each name, to all completions; return lists by completion."""
    values: dict[str, list[list[float]]] = {name: [[] for _ in completion_ids] for name in names}
    for rows, request in score_requests(prompt_ids, completion_ids, batch_size, device):
        for name, scores in zip(names, score(request), strict=True):
            for row, row_scores in zip(rows, scores.tolist(), strict=True):
                values[name][row] = row_scores[: len(completion_ids[row])]
    return values
