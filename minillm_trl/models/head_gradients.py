"""Gradients of hidden states and LM head from the gradients of a chunk's logits."""

import torch

from .lm_head import LMHead
from .packed_weights import multiply, suits_onednn

# float16 holds numbers below 2^16. A chunk's gradient is scaled so that its largest entry is just below 2^15.
_FLOAT16_EXPONENT = 15

# Elements of a product that is added to the gradient of the head's weight, so that it never takes a second (V, H)
_BLOCK_ELEMENTS = 2**24


def cast_gradient(gradient: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradient of a chunk's logits `(n, V)` in `dtype`, and the power of two that scales it in float16.

    Importance weights and advantages reach a thousand, and gradients of improbable tokens are tiny: together they
    exceed float16's range. So the largest entry decides the scale. bfloat16 has the range of float32 and needs no
    scale.
    """
    if dtype != torch.float16:
        return gradient.to(dtype), None
    largest = torch.linalg.vector_norm(gradient, ord=torch.inf)
    # The clamp keeps the scale of the smallest gradients finite
    exponent = (_FLOAT16_EXPONENT - torch.frexp(largest).exponent).clamp(max=100)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return gradient.mul_(scale).to(dtype), scale


def add_gradients(
    gradients: dict[str, torch.Tensor],
    of_logits: torch.Tensor,
    states: torch.Tensor,
    head: LMHead,
    part: slice,
    scale: torch.Tensor | None,
) -> None:
    """Add a chunk's contribution to the gradients of hidden states and head.

    Args:
        gradients (`dict`): totals for `hidden` `(N, H)`, `weight` `(V, H)` and `bias` `(V,)`; changed in place.
        of_logits (`torch.Tensor` of shape `(n, V)`): gradient of the chunk's logits, times `scale`.
        states (`torch.Tensor` of shape `(n, H)`): the chunk's hidden states.
        head ([`LMHead`]): the head.
        part (`slice`): the chunk's place among the N tokens.
        scale (`torch.Tensor`, *optional*): scalar from [`cast_gradient`].
    """

    def add(total: torch.Tensor, scaled: torch.Tensor) -> None:
        total += scaled if scale is None else scaled / scale

    if "hidden" in gradients:
        add(gradients["hidden"][part], _product(of_logits, head.weight))
    if "weight" in gradients:
        _add_to_weight(gradients["weight"][: of_logits.shape[1]], of_logits, states, scale)
    if "bias" in gradients:
        add(gradients["bias"][: of_logits.shape[1]], of_logits.sum(dim=0, dtype=gradients["bias"].dtype))


def _add_to_weight(
    total: torch.Tensor, of_logits: torch.Tensor, states: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """Add a chunk's contribution to the gradient `total` `(V, H)` of the head's weight."""
    if scale is None and total.dtype == of_logits.dtype:
        total.addmm_(of_logits.T, states)  # the product adds to the total as it goes
        return
    size, width = total.shape
    rows = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, size, rows):
        block = slice(start, min(start + rows, size))
        product = _product(of_logits[:, block].T, states)
        total[block] += product if scale is None else product / scale


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b, for float16 and on GPUs in at least float32: sums over a chunk's tokens may overflow float16."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16:
        return a.float() @ b.float()
    if suits_onednn(a, b):
        return multiply(a, b.T)
    return a @ b
