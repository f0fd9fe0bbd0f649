"""Gradients of hidden states and head against autograd: chunks, blocks, scales and precisions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm_trl.models import head_gradients
from minillm_trl.models.head_gradients import add_gradients, cast_gradient
from minillm_trl.models.lm_head import LMHead

N, VOCAB, SHARED, WIDTH = 6, 11, 9, 4


@pytest.mark.parametrize("largest", [1e-20, 3e-9, 0.5, 1.0, 1.5, 2.0**15, 7e4, 1e30])
def test_largest_entry_in_float16_is_just_below_2_to_the_15(largest: float):
    gradient = torch.tensor([[largest, -largest / 8], [0.0, largest / 3]])
    found, scale = cast_gradient(gradient.clone(), torch.float16)
    assert found.dtype == torch.float16
    exponent = torch.frexp(scale).exponent - 1
    assert torch.ldexp(torch.ones(()), exponent) == scale  # a power of two, which rounds nothing
    assert 2**14 <= found.abs().max() < 2**15
    torch.testing.assert_close(found.double() / scale.double(), gradient.double(), rtol=2**-11, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-38])
def test_scale_of_tiny_gradients_is_finite(value: float):
    found, scale = cast_gradient(torch.full((2, 3), value), torch.float16)
    assert scale.isfinite()
    assert (found.double() / scale.double() - value).abs().max() < 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_precisions_need_no_scale(dtype: torch.dtype):
    gradient = torch.tensor([[7e4, 1e-9]])
    found, scale = cast_gradient(gradient, dtype)
    assert scale is None
    assert torch.equal(found, gradient.to(dtype))


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("block", [1, 3 * WIDTH, 2**24], ids=["a row", "three rows", "all"])
@pytest.mark.parametrize("names", [("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",)], ids=str)
def test_contributions_of_chunks_add_up(monkeypatch: pytest.MonkeyPatch, scale, dtype, block: int, names: tuple):
    """Of small integers, whose sums are exact in each precision; totals are in at least float32."""
    monkeypatch.setattr(head_gradients, "_BLOCK_ELEMENTS", block)
    draws = torch.Generator().manual_seed(0)
    of_logits, states, weight = (
        torch.randint(-3, 4, shape, generator=draws).to(dtype) for shape in ((N, SHARED), (N, WIDTH), (VOCAB, WIDTH))
    )
    total_dtype = torch.promote_types(dtype, torch.float32)
    shapes = {"hidden": (N, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,)}
    totals = {name: torch.full(shapes[name], 2.0, dtype=total_dtype) for name in names}
    factor = None if scale is None else torch.tensor(scale, dtype=total_dtype)
    for part in (slice(0, 4), slice(4, 8)):  # the second chunk has two tokens
        add_gradients(totals, of_logits[part], states[part], LMHead(weight[:SHARED], None), part, factor)
    g, x, w = (each.double() for each in (of_logits, states, weight[:SHARED]))
    expected = {"hidden": g @ w, "weight": g.T @ x, "bias": g.sum(0)}
    for name, total in totals.items():
        assert total.dtype == total_dtype
        rows = len(expected[name])
        torch.testing.assert_close(total[:rows].double(), 2 + expected[name] / (scale or 1.0), rtol=0, atol=0)
        assert (total[rows:] == 2.0).all()  # rows of the vocabulary that the models do not share


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_of_a_large_weight_is_not_there_twice(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """It has 3000 elements; all that is computed on the way is smaller."""
    monkeypatch.setattr(head_gradients, "_BLOCK_ELEMENTS", 600)
    sizes: list[int] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if not torch._C._is_alias_of(found, args[0]):
                sizes.append(found.numel())
            return found

    of_logits, states = torch.ones(2, 100, dtype=dtype), torch.ones(2, 30, dtype=dtype)
    total, scale = torch.zeros(100, 30), torch.tensor(2.0) if dtype == torch.float16 else None
    with Noting():
        add_gradients({"weight": total}, of_logits, states, LMHead(total, None), slice(0, 2), scale)
    assert (total == (2.0 if scale is None else 1.0)).all()
    assert max(sizes, default=0) <= 600


def test_sums_over_tokens_do_not_overflow_in_float16():
    """Of 4096 tokens with entries near 2^15."""
    of_logits = torch.full((4096, 3), 3e4, dtype=torch.float16)
    states, head = torch.full((4096, 2), 8.0, dtype=torch.float16), LMHead(torch.full((3, 2), 8.0).half(), None)
    shapes = {"hidden": (4096, 2), "weight": (3, 2), "bias": (3,)}
    totals = {name: torch.zeros(shape) for name, shape in shapes.items()}
    add_gradients(totals, of_logits, states, head, slice(0, 4096), torch.tensor(2.0))
    expected = {"hidden": 3 * 8 * 3e4, "weight": 4096 * 8 * 3e4, "bias": 4096 * 3e4}
    for name, total in totals.items():
        torch.testing.assert_close(total, torch.full_like(total, expected[name] / 2), rtol=1e-3, atol=0)
