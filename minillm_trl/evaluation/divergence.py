"""How far a student is from its teacher on given completions."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..fused_head import ScoreRequest, score_hidden_states
from ..lm_head import LMHead, completion_hidden_states


@torch.no_grad()
def completion_reverse_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[float]:
    r"""Reverse KL summed along each completion, exact at each token.

    $$ \sum_{t=1}^{T} \mathrm{KL}\big(q(\cdot|y_{<t}, x) \,\|\, p(\cdot|y_{<t}, x)\big) $$

    On completions sampled from the student its mean is an unbiased estimate of KL(q || p) over whole completions (of
    at most the length limit), with less variance than that of the log-ratio of the sampled tokens.

    Args:
        student, teacher ([`~transformers.PreTrainedModel`]): the two models, with one tokenizer.
        prompt_ids (`Sequence[Sequence[int]]`): prompts without padding.
        completion_ids (`Sequence[Sequence[int]]`): completions, the end-of-sequence token included.
        vocab_size (`int`): number of leading vocabulary rows that both models share.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of both distributions.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass.

    Returns:
        `list[float]`: nats, one number a completion; 0 for an empty one.
    """
    device = student.get_output_embeddings().weight.device
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    result = [0.0] * len(order)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompt_width = max(len(prompt_ids[row]) for row in rows)
        width = max(1, *(len(completion_ids[row]) for row in rows))
        ids = torch.zeros(len(rows), prompt_width + width, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens = [*prompt_ids[row], *completion_ids[row]]
            first = prompt_width - len(prompt_ids[row])
            ids[i, first : first + len(tokens)] = torch.tensor(tokens)
            mask[i, first : first + len(tokens)] = True
        ids, mask = ids.to(device), mask.to(device)
        states, teacher_states = (completion_hidden_states(model, ids, mask, width) for model in (student, teacher))
        request = ScoreRequest(ids, mask, mask[:, -width:], temperature, teacher_states)
        scores = score_hidden_states(states, LMHead.of(student), request, vocab_size, LMHead.of(teacher))
        for row, total in zip(rows, scores.divergence.sum(dim=1).tolist(), strict=True):
            result[row] = total
    return result
