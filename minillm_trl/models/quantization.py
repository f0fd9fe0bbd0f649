"""What bitsandbytes does to 4-bit weights on a CPU."""

from torch import nn


def keep_4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of `model` on CPUs with AVX512-BF16.

    In eval mode it does so in place, for a kernel that refuses layers whose width is no multiple of 32. A student that
    samples in eval mode would train with weights in that layout.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
