"""Masks over completions, and all divisions by a number of tokens.

Shapes: B sequences, T completion positions. A mask is boolean, True where a token counts. The end-of-sequence token
counts. Padding never does, so its values may be anything, even NaN or infinity.
"""

from collections.abc import Sequence

import torch


def completion_mask(completion_ids: torch.Tensor, eos_token_ids: Sequence[int]) -> torch.Tensor:
    """Mark the tokens up to and including the first end-of-sequence token of each row.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`): sampled token ids.
        eos_token_ids (`Sequence[int]`): every id that ends a completion.

    Returns:
        `torch.Tensor` of shape `(B, T)`, bool. A row without an end-of-sequence token is all True: a completion
        truncated at the limit is a complete sample of the problem with that horizon.
    """
    eos = torch.tensor(list(eos_token_ids), device=completion_ids.device)
    is_eos = torch.isin(completion_ids, eos)
    ended_before = is_eos.cumsum(dim=1) - is_eos.long()  # number of ends strictly before t
    return ended_before == 0


def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum `values` where `mask` is True; other values, even NaN, add nothing and get zero gradient."""
    selected = values.masked_fill(~mask, 0.0)
    return selected.sum() if dim is None else selected.sum(dim=dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Average `values` where `mask` is True; return 0, with zero gradient, if the mask is all False."""
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return count, sum and sum of squares of `values` where `mask` is True: `(3,)`, float64.

    Moments of several processes can be added up.
    """
    selected = values.double().masked_fill(~mask, 0.0)
    return torch.stack([mask.sum().double(), selected.sum(), selected.square().sum()])


def normalize_loss(total: torch.Tensor, normalizer: torch.Tensor | float) -> torch.Tensor:
    r"""Divide the summed loss of a micro-batch by the size of the optimizer step: $\frac{1}{N} \sum_{b,t} \ell_{b,t}$.

    Args:
        total (`torch.Tensor`): scalar, the sum of the losses of the micro-batch's tokens, nats.
        normalizer (`torch.Tensor` or `float`): N. For the token mean, the number of tokens in the whole optimizer step
            (all micro-batches of the accumulation window, all processes) divided by the number of processes, because
            DDP averages gradients over processes. For the sequence sum, the number of sequences instead.

    Returns:
        `torch.Tensor`, a scalar; 0 with zero gradient for a step without tokens.
    """
    normalizer = torch.as_tensor(normalizer, dtype=total.dtype, device=total.device)
    return total / normalizer.clamp(min=torch.finfo(total.dtype).tiny)
