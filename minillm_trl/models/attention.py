"""Attention while decoding: without cuDNN's kernels, and without copies of keys and values for each query head.

Since torch 2.11, `scaled_dot_product_attention` prefers these kernels in half precision on Hopper and Blackwell GPUs.
They have two problems:

- With a mask, the backward pass returns NaN for rows that attend to nothing, such as left padding, at lengths of 64
  plus a multiple of 128 (pytorch issue 196678).
- They are prepared for each new shape, and decoding has a new shape for every token. The first rollout at a batch size
  takes several times as long.

With grouped queries (Llama, Qwen, SmolLM2), transformers copies the keys and values of each group to all of its query
heads, unless a call has a single token. A model that catches up on several tokens would copy its whole cache in every
layer. Here the heads of a group become further queries of the same keys instead.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_WITHOUT_GROUPS = torch.nn.Module()  # stands for an attention layer that has as many key heads as query heads


def avoid_cudnn_attention() -> None:
    """Disable the kernels for the whole process, for training.

    A context manager would not be enough: gradient checkpointing runs forward passes inside the backward pass.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable the kernels inside a `with` statement or a decorated function, for decoding."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


class _Decoding(threading.local):
    """Whether the current thread decodes: another one may run an update meanwhile."""

    in_groups = False


_decoding = _Decoding()


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Let "sdpa" attention read the keys and values of each group once, inside a `with` statement, for decoding.

    It concerns the current thread alone. It leaves alone what other code has put in the place of transformers'
    function.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        # It stays, as a thread that finishes must not remove it under another one. Elsewhere it is the function above.
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    before, _decoding.in_groups = _decoding.in_groups, True
    try:
        yield
    finally:
        _decoding.in_groups = before


def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attend like [`attend_in_groups`] in a thread within [`grouped_attention`], else as `sdpa_attention_forward`."""
    return attend_in_groups(*args, **kwargs) if _decoding.in_groups else sdpa_attention_forward(*args, **kwargs)


def attend_in_groups(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend like `sdpa_attention_forward`, with the query heads of a group as further queries of its keys.

    Args:
        module: the attention layer.
        query (`torch.Tensor` of shape `(B, H, T, D)`): queries of H heads.
        key, value (`torch.Tensor` of shape `(B, H / groups, S, D)`): keys and values.
        attention_mask (`torch.Tensor` of shape `(B, 1, T, S)`, *optional*): what each query may attend to. Without
            it, or with a mask for each head or for all queries together, nothing is grouped.

    Returns:
        The output `(B, T, H, D)`, and None for the weights.
    """
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    shares = attention_mask is not None and tuple(attention_mask.shape[1:3]) == (1, length)
    shares = shares and kwargs.get("position_bias") is None
    if groups == 1 or length == 1 or not shares:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    folded, mask = query.reshape(rows, -1, groups * length, width), attention_mask.repeat(1, 1, groups, 1)
    output, _ = sdpa_attention_forward(_WITHOUT_GROUPS, folded, key, value, mask, **kwargs)
    return output.transpose(1, 2).reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None
