"""The two parts of a causal language model that are run apart: its body, and the head that projects to logits."""

import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError


@dataclass(frozen=True)
class LMHead:
    """The last projection of a causal language model: `softcap(scale * (W h + b))`.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`): projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): bias.
        scale (`float`): factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap (`float`, *optional*): c in c tanh(z / c) (Gemma's `final_logit_softcapping`).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LMHead":
        """Read the head of `model` as it stands now, with its adapters.

        Sharding wrappers replace its tensors between calls, and gather them only while the head's module runs.

        Raises:
            ValueError: for adapters on the head that are no linear map of their own, and for a quantised head.
        """
        return cls.of_projection(model.get_output_embeddings(), model.config)

    @classmethod
    def of_projection(cls, module: torch.nn.Module, config: PreTrainedConfig) -> "LMHead":
        """[`LMHead.of`] the model whose output projection is `module`, with the model's configuration."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        weight, bias = _projection(module)
        return cls(weight, bias, scale, getattr(config, "final_logit_softcapping", None))

    def frozen(self, device: torch.device) -> "LMHead":
        """The head as it is now on `device`, without a graph."""
        weight, bias = (None if each is None else each.detach().to(device) for each in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def project(self, hidden_states: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """W h + b for the first `vocab_size` rows, `(N, H) -> (N, vocab_size)`."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        weight = self.weight[:vocab_size]
        return torch.nn.functional.linear(hidden_states.to(weight.dtype), weight, bias)

    def transform(self, projected: torch.Tensor) -> torch.Tensor:
        """Logits in at least float32."""
        logits = projected.to(torch.promote_types(projected.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def transform_gradient(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Gradient of the projection from that of the logits, in place; `logits` are needed with a soft cap."""
        if self.softcap is not None:
            gradient.mul_(1.0 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)

    def logits(self, hidden_states: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Logits of the first `vocab_size` rows in at least float32, `(N, H) -> (N, vocab_size)`."""
        return self.transform(self.project(hidden_states, vocab_size))


def _projection(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of an output projection with its adapters: W + s B A of LoRA.

    A teacher may have such an adapter; GRPOTrainer refuses students with one, but for `modules_to_save`.
    """
    if type(module) is torch.nn.Linear:  # most heads are: generation and evaluation need not wait seconds for peft
        return module.weight, module.bias
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        trained = not module.disable_adapters and module.active_adapters
        return _projection(module.modules_to_save[module.active_adapters[0]] if trained else module.original_module)
    if not isinstance(module, BaseTunerLayer):
        if not module.weight.is_floating_point():
            raise UserError(
                f"The LM head is quantised ({type(module).__name__}). Exclude it from quantisation: add its name to "
                "llm_int8_skip_modules of the quantization_config."
            )
        return module.weight, getattr(module, "bias", None)
    weight, bias = _projection(module.get_base_layer())
    if module.disable_adapters or module.merged:
        return weight, bias
    for adapter in module.active_adapters:
        if not isinstance(module, LoraLinear) or module.use_dora.get(adapter) or module.lora_bias.get(adapter):
            raise UserError(
                f"The adapter {adapter!r} on the LM head ({type(module).__name__}) is not supported: the head is "
                "computed in chunks from its weights, which plain LoRA changes by a product of two matrices. Take the "
                "head out of target_modules, or put it into modules_to_save."
            )
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter)
    return weight, bias


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each real token counted from its row's first real token, `(B, L) -> (B, L)`.

    Learned positions (GPT-2) are wrong under left padding without it; rotary ones do not care.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Whether the architecture takes `position_ids` (BLOOM's ALiBi, for one, has no positions to pass)."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """Return the causal language model within a `PeftModel`, with its adapters in place; other models as they are.

    Raises:
        ValueError: for adapters that are no part of it: prompts and prefixes.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise UserError(
            f"{type(config).__name__} ({type(model).__name__}) is not supported: it puts virtual tokens before the "
            "prompt. Merge what can be merged, or use LoRA."
        )
    return model.get_base_model()


def check_embedded(model: PreTrainedModel, token_ids: Iterable[Sequence[int]]) -> None:
    """Check that a model has embeddings of all tokens.

    Raises:
        ValueError: naming the highest token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if (highest := max(itertools.chain.from_iterable(token_ids), default=0)) >= rows:
        raise UserError(
            f"The tokenizer gives the token {highest} in a prompt, a reference or for padding, but the model has "
            f"{rows} embeddings only ({model.name_or_path!r}). Take the model's own tokenizer, or resize its "
            "embeddings."
        )


def completion_hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> torch.Tensor:
    """Last hidden states at the positions that predict the completion.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model, not wrapped.
        input_ids (`torch.Tensor` of shape `(B, P+T)`): left-padded prompts and right-padded completions.
        attention_mask (`torch.Tensor` of shape `(B, P+T)`): non-zero on real tokens.
        completion_length (`int`): T.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`.
    """
    model = without_wrapper(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if accepts_position_ids(model):
        inputs["position_ids"] = position_ids(attention_mask)
    hidden_states = model.base_model(**inputs).last_hidden_state
    # a model with a device_map may end on another device than it begins
    return hidden_states[:, -completion_length - 1 : -1].to(input_ids.device)


def rounding_tolerance(dtype: torch.dtype, roundings: int) -> float:
    """Return how far apart, relative to the largest, numbers may be that differ by `roundings` roundings in `dtype`.

    It is at least 1e-3, since GPUs may round the factors of float32 products to ten bits (TF32).
    """
    return max(1e-3, roundings * torch.finfo(dtype).eps)


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Check on a short input that [`LMHead`] reproduces the model's own logits.

    What the head's module returns is handed on in float32, so that what the model makes of it is compared to far
    better than the precision of its weights; and once more at many times its size, where a soft cap shows.

    Raises:
        ValueError: if it does not, because the architecture transforms its logits in a way that is unknown here.
            Scoring such a model would be silently wrong. Also if the head is sharded over processes.
    """
    output = model.get_output_embeddings()
    if isinstance(output.weight, DTensor) or output.weight.is_meta:
        where = "offloaded by its device_map" if output.weight.is_meta else "sharded over processes"
        raise UserError(
            f"The LM head of the {name} ({type(model).__name__}) is {where}, but each process needs all of it. "
            "Keep it on a device; shard the blocks alone (shard_teacher=True does)."
        )
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if accepts_position_ids(model):
        inputs["position_ids"] = position_ids(inputs["attention_mask"])
    training = model.training
    model.eval()
    head = LMHead.of(model)
    hidden_states = completion_hidden_states(model, ids, inputs["attention_mask"], ids.shape[1] - 1)
    for factor in (1.0, 64.0):
        hook = output.register_forward_hook(lambda module, args, logits, factor=factor: logits.float() * factor)
        try:
            expected = model(**inputs).logits[:, :-1].float()
        finally:
            hook.remove()
        projected = head.project(hidden_states, expected.shape[-1])
        actual = head.transform(projected.float() * factor).to(expected.device)
        error = (actual - expected).abs().max().item()
        tolerance = rounding_tolerance(projected.dtype, roundings=2)
        if not error <= tolerance * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"The LM head of the {name} ({type(model).__name__}) is not reproduced by minillm_trl: logits differ "
                f"by up to {error:.2g} where the largest is {expected.abs().max().item():.2g}. Its architecture "
                "transforms hidden states or logits in a way that is not supported."
            )
    model.train(training)
