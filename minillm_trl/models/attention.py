"""cuDNN's attention kernels, which torch is kept from.

`scaled_dot_product_attention` prefers them in half precision on Hopper and Blackwell since torch 2.11. With a mask
their backward pass gives NaN for rows that attend to nothing, as left padding has them, where the length is 64 more
than a multiple of 128 (pytorch issue 196678). And they are prepared anew for each shape, of which decoding has one a
token: the first rollout of a batch size then takes several times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def avoid_cudnn_attention() -> None:
    """For training, in the whole process: gradient checkpointing runs forward passes inside the backward pass."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """For decoding, for the time of a `with` statement or of a call of what it decorates."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
