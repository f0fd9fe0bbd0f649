"""Disable cuDNN's attention kernels.

Since torch 2.11, `scaled_dot_product_attention` prefers these kernels in half precision on Hopper and Blackwell GPUs.
They have two problems:

- With a mask, the backward pass returns NaN for rows that attend to nothing, such as left padding, at lengths of 64
  plus a multiple of 128 (pytorch issue 196678).
- They are prepared for each new shape, and decoding has a new shape for every token. The first rollout at a batch size
  takes several times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
