"""Tokens drawn at given uniform numbers."""

import torch

_BLOCK = 512  # tokens of the vocabulary that are summed at a time


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """Draw one token a row: the inverse CDF of softmax(logits / temperature) at `uniforms`.

    Args:
        logits (`torch.Tensor` of shape `(B, V)`): unnormalised log-probs; -inf excludes a token.
        uniforms (`torch.Tensor` of shape `(B,)`, float64, *optional*): numbers in [0, 1). None takes the most likely
            token instead.
        temperature (`float`): > 0; unused when `uniforms` is None.

    Returns:
        `torch.Tensor` of shape `(B,)`, int64.
    """
    if uniforms is None:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return invert_cdf(torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1), uniforms)


def invert_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the index `(B,)` whose interval of the cumulative weights holds `uniforms` times their sum.

    Sums over blocks of the vocabulary come first, then those over the tokens of the block that holds the number.
    That takes a fraction of the time of a cumulative sum over the vocabulary.

    Args:
        weights (`torch.Tensor` of shape `(B, V)`): non-negative, with a positive sum; an index of weight 0 is never
            returned. A row with NaN gives any index: the trainer leaves out rows with such numbers when it scores
            them.
        uniforms (`torch.Tensor` of shape `(B,)`, float64): numbers in [0, 1).
    """
    size = weights.shape[-1]
    padded = torch.nn.functional.pad(weights, (0, -size % _BLOCK))
    blocks = padded.unflatten(-1, (-1, _BLOCK))  # (B, V / _BLOCK, _BLOCK)
    upto = blocks.sum(dim=-1).double().cumsum(dim=-1)
    thresholds = uniforms[:, None] * upto[:, -1:]
    block = _first_above(upto, thresholds)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(dim=-1)
    found = block * _BLOCK + _first_above(inside, thresholds - before)
    return found.squeeze(1).clamp(max=size - 1)  # NaN would lead into the padding


def _first_above(cumulative: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Return the first index `(B, 1)` with `cumulative` `(B, n)` above the threshold `(B, 1)`.

    Where rounding leaves no such index, it is the last one of positive weight.
    """
    found = torch.searchsorted(cumulative, thresholds, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(found, last).clamp(max=cumulative.shape[1] - 1)
