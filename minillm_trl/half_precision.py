"""A copy of the student in half precision, from which rollouts are sampled while float32 weights are trained."""

import copy

import torch
from transformers import PreTrainedModel


class HalfPrecisionCopy:
    """A copy of a model whose floating-point weights are in half precision, for sampling.

    Under mixed precision every forward pass casts the float32 weights anew: it moves six bytes a weight, where the
    product with a few tokens reads two. Weights that are in half precision already, or quantised (the base of a LoRA
    student), are shared with the model; the others are copied, and `refresh` brings them up to date. The model's own
    tensors are never written to.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that is trained, not wrapped.
        dtype (`torch.dtype`): `torch.float16` or `torch.bfloat16`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        memo: dict[int, object] = {id(each): each for each in model.buffers()}
        for parameter in model.parameters():
            memo[id(parameter)] = parameter
            if parameter.dtype == torch.float32:
                half = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                memo[id(parameter)] = half
                self._pairs.append((parameter, half))
        # wrappers patch `forward` of the instance (autocast, scoring) with functions bound to the original
        memo |= {id(vars(module)["forward"]): None for module in model.modules() if "forward" in vars(module)}
        self.model = copy.deepcopy(model, memo)
        for module in self.model.modules():
            vars(module).pop("forward", None)
        self.model.eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that have been trained since."""
        for trained, half in self._pairs:
            half.copy_(trained)
