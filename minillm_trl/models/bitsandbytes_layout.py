"""Keep bitsandbytes' 4-bit weights trainable on CPUs."""

from typing import Any

from torch import nn


def keep_4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of `model` on CPUs with AVX512-BF16.

    In eval mode bitsandbytes repacks them in place, for an inference kernel that needs widths divisible by 32. A
    student that samples in eval mode would then train on repacked weights.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
