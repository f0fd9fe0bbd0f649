"""Score given completions token by token: the KL divergence of two models, and the loss of one model."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.fused_head import ScoreRequest, score_hidden_states
from ..models.lm_head import LMHead, check_embedded, completion_hidden_states


@torch.no_grad()
def token_divergences(
    first: PreTrainedModel,
    second: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[list[float]]:
    r"""Return the exact KL divergence of two models' next-token distributions at each token of completions.

    $$ \mathrm{KL}\big(f(\cdot|y_{<t}, x) \,\|\, s(\cdot|y_{<t}, x)\big), \qquad t = 1, \dots, T $$

    With the student as `first` and the teacher as `second` this is the reverse KL; swapped, it is the forward KL. On
    completions sampled from `first`, the mean over completions of the sum over tokens is an unbiased estimate of
    KL(first || second) over completions up to the length limit, with less variance than the log-ratio of the sampled
    tokens.

    Args:
        first, second ([`~transformers.PreTrainedModel`]): the two models in eval mode, with the same tokenizer.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        completion_ids (`Sequence[Sequence[int]]`): completions, including the end-of-sequence token.
        vocab_size (`int`): number of leading vocabulary rows that both models share.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of both distributions.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.

    Returns:
        `list[list[float]]`: nats, one list per completion with one number per token; empty for an empty completion.

    Raises:
        ValueError: if a prompt has no tokens, or the number of prompts differs from the number of completions.
    """
    head, second_head = LMHead.of(first), LMHead.of(second)

    def divergences(request: ScoreRequest) -> torch.Tensor:
        states, second_states = (_states(model, request) for model in (first, second))
        request = request._replace(temperature=temperature, teacher_hidden_states=second_states)
        scores = score_hidden_states(states, head, request, vocab_size, second_head)
        assert scores.divergence is not None  # the request has the second model's states
        return scores.divergence

    return _token_values(divergences, prompt_ids, completion_ids, batch_size, head.weight.device)


@torch.no_grad()
def completion_losses(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
) -> list[list[float]]:
    r"""Return the language-modelling loss of each token of completions: $-\log q(y_t|y_{<t}, x)$, at temperature 1.

    The softmax is over the model's whole vocabulary, including padding rows, as in the loss of `transformers`.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model in eval mode.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding, at least one token each.
        completion_ids (`Sequence[Sequence[int]]`): completions, with or without end-of-sequence token.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.

    Returns:
        `list[list[float]]`: nats, one list per completion with one number per token.

    Raises:
        ValueError: if a prompt has no tokens, the number of prompts differs from the number of completions, or the
            model has no embedding for a token.
    """
    check_embedded(model, (*prompt_ids, *completion_ids))
    head = LMHead.of(model)

    def losses(request: ScoreRequest) -> torch.Tensor:
        return -score_hidden_states(_states(model, request), head, request, head.weight.shape[0]).logps

    return _token_values(losses, prompt_ids, completion_ids, batch_size, head.weight.device)


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
    score: Callable[[ScoreRequest], torch.Tensor],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
    device: torch.device,
) -> list[list[float]]:
    """Apply `score`, which returns values `(B, T)` for a batch, and return the values by completion."""
    values: list[list[float]] = [[] for _ in completion_ids]
    for rows, request in score_requests(prompt_ids, completion_ids, batch_size, device):
        for row, scores in zip(rows, score(request).tolist(), strict=True):
            values[row] = scores[: len(completion_ids[row])]
    return values
