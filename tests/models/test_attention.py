"""Attention of grouped queries while decoding: the same output without copies of the keys, in its own thread alone."""

import threading

import pytest
import torch
from conftest import build_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minillm_trl.models.attention import (
    attend_in_groups,
    avoid_cudnn_attention,
    grouped_attention,
    without_cudnn_attention,
)
from minillm_trl.rollouts.decoding import check_decoding
from minillm_trl.rollouts.sampling import sample_prompts

PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [3, 4, 5]]


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


def grouped_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 60}
    config = Qwen2Config(**sizes, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa")
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def counted_copies(monkeypatch) -> list[int]:
    """Return a list that grows when keys or values are copied to the query heads."""
    copies, repeat = [], sdpa_attention.repeat_kv

    def counted(*args):
        copies.append(1)
        return repeat(*args)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", counted)
    return copies


def padded() -> dict:
    """Return two prompts, one of them padded, so that attention has a mask."""
    return {"input_ids": torch.tensor([[0, 6, 7], [3, 4, 5]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}


def inputs(length: int) -> dict:
    torch.manual_seed(0)
    mask = torch.ones(2, 1, length, 10, dtype=torch.bool).tril(10 - length)
    mask[0, ..., :3] = False
    tensors = {
        "query": torch.randn(2, 6, length, 8),
        "key": torch.randn(2, 2, 10, 8),
        "value": torch.randn(2, 2, 10, 8),
    }
    return {**{name: each.double() for name, each in tensors.items()}, "attention_mask": mask}


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("kind", ["bool", "float", "a mask for each head", "for all queries", "no mask"])
def test_output_is_that_of_repeated_keys(length: int, kind: str):
    given = inputs(length)
    mask = given["attention_mask"]
    if kind == "float":
        given["attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, -1e9).double()
    elif kind == "a mask for each head":
        given["attention_mask"] = mask.repeat(1, 6, 1, 1)
        given["attention_mask"][:, 4, :, 5] = False
    elif kind == "for all queries":
        given["attention_mask"] = mask[:, :, :1]
    elif kind == "no mask":
        given["attention_mask"] = None
    key, value = (given[name].repeat_interleave(3, dim=1) for name in ("key", "value"))
    attention_mask, is_causal = given["attention_mask"], kind == "no mask" and length > 1
    expected = torch.nn.functional.scaled_dot_product_attention(
        given["query"],
        key if not is_causal else key[:, :, :length],
        value if not is_causal else value[:, :, :length],
        attn_mask=attention_mask,
        is_causal=is_causal,
        scale=0.3,
    ).transpose(1, 2)
    found, nothing = attend_in_groups(Layer(), **given, scaling=0.3)
    assert nothing is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()  # as transformers' own, since some layers call `view`


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_keys_are_not_copied_for_groups_of_any_size(monkeypatch, groups: int):
    given, copies = inputs(5), counted_copies(monkeypatch)
    given |= {name: torch.randn(2, 6 // groups, 10, 8, dtype=torch.float64) for name in ("key", "value")}
    layer = Layer()
    layer.num_key_value_groups = groups
    found, _ = attend_in_groups(layer, **given)
    assert not copies
    torch.testing.assert_close(found, sdpa_attention.sdpa_attention_forward(layer, **given)[0])
    assert len(copies) == (0 if groups == 1 else 2)


@pytest.mark.parametrize("length", [1, 5])
def test_bias_of_positions_differs_by_head(length: int):
    given = inputs(length)
    bias = torch.randn(1, 6, length, 10, dtype=torch.float64)
    key, value = (given[name].repeat_interleave(3, dim=1) for name in ("key", "value"))
    mask = bias.masked_fill(~given["attention_mask"], -1e300)
    expected = torch.nn.functional.scaled_dot_product_attention(given["query"], key, value, mask, scale=0.3)
    found, _ = attend_in_groups(Layer(), **given, scaling=0.3, position_bias=bias)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("enabled", [True, False])
def test_kernels_of_cudnn_are_off_and_come_back(enabled: bool):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        with without_cudnn_attention():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        with pytest.raises(ArithmeticError), without_cudnn_attention():
            raise ArithmeticError
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        avoid_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def options(**more) -> dict:
    common = {"keys": [(row,) for row in range(4)], "max_new_tokens": 20, "eos_token_ids": [0], "pad_token_id": 1}
    return {**common, "teacher": grouped_model(1), "alpha": 0.4, "coin_key": (7,), "keep_states": True, **more}


@pytest.mark.parametrize("more", [{}, {"shared_coins": False}, {"mixing": "speculative"}], ids=str)
def test_sampling_never_copies_keys_and_samples_stay(monkeypatch, more: dict):
    student = grouped_model()
    with monkeypatch.context() as plain:
        plain.setattr("minillm_trl.models.attention.attend_in_groups", sdpa_attention.sdpa_attention_forward)
        expected = sample_prompts(
            student.double(), PROMPTS, **options(**more) | {"teacher": grouped_model(1).double()}
        )

    def refuse(*args):
        raise AssertionError("keys were copied")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", refuse)
    found = sample_prompts(student, PROMPTS, **options(**more) | {"teacher": grouped_model(1).double()})
    assert found == expected
    check_decoding(grouped_model(), "student")


def test_threads_attend_independently(monkeypatch):
    """A rollout in one thread and an update in another: neither changes the attention of the other."""
    copies, model = counted_copies(monkeypatch), grouped_model()
    turns = {name: threading.Event() for name in ("rollout has begun", "update is done", "first rollout has ended")}
    rollout_copies = []

    def first_rollout():
        with grouped_attention():
            turns["rollout has begun"].set()
            turns["update is done"].wait(10)
        turns["first rollout has ended"].set()

    def second_rollout():
        with grouped_attention():
            turns["first rollout has ended"].wait(10)
            before = len(copies)
            model(**padded())
            rollout_copies.append(len(copies) - before)

    threads = [threading.Thread(target=target) for target in (first_rollout, second_rollout)]
    for thread in threads:
        thread.start()
    assert turns["rollout has begun"].wait(10)
    model(**padded())
    assert copies  # the update in this thread copies keys, as transformers does
    turns["update is done"].set()
    for thread in threads:
        thread.join(10)
    assert rollout_copies == [0]


def test_outside_of_sampling_attention_is_that_of_transformers(monkeypatch):
    copies, model = counted_copies(monkeypatch), grouped_model()
    with grouped_attention():
        with grouped_attention():  # nested, as around a check within a rollout
            pass
        model(**padded())
    assert not copies
    model(**padded())
    assert copies
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def of_somebody_else(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", of_somebody_else)
    sample_prompts(build_model("llama"), PROMPTS, **options(teacher=None, alpha=0.0))
    assert calls
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is of_somebody_else
