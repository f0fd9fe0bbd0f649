"""Run the two parts of a causal language model separately: its body, and the head that projects to logits."""

import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError
from .packed_weights import multiply, suits_onednn


class TeacherHead(Protocol):
    """Turns what the rollout buffer keeps of the teacher for a token into its logits.

    For a local teacher these states are hidden states, and this is its [`LMHead`]. For a teacher on a server, see
    [`~minillm_trl.teacher_server.top_k.TopKHead`].
    """

    def teacher_logits(
        self, states: torch.Tensor, vocab_size: int, student_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the teacher's logits `(n, vocab_size)`, given those of the student for the same tokens."""


@dataclass(frozen=True)
class LMHead:
    """The last projection of a causal language model: `softcap(scale * (W h + b))`.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`): projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): bias.
        scale (`float`): factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap (`float`, *optional*): c in c tanh(z / c) (Gemma's `final_logit_softcapping`).
        packed (`torch.Tensor`, *optional*): the same weight, packed by [`~packed_weights.packed_weights`].
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    packed: torch.Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LMHead":
        """Read the current head of `model`, with its adapters.

        Do not keep the result: sharding wrappers replace its tensors between calls, and gather them only while the
        head's module runs.

        Raises:
            ValueError: for adapters on the head other than plain LoRA, and for a quantised head.
        """
        return cls.of_projection(model.get_output_embeddings(), model.config)

    @classmethod
    def of_projection(cls, module: torch.nn.Module, config: PreTrainedConfig) -> "LMHead":
        """Read the head like [`LMHead.of`], from the output projection and configuration of a model."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        weight, bias = _projection(module)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(weight, bias, scale, softcap, getattr(module, "packed_weight", None))

    def frozen(self, device: torch.device) -> "LMHead":
        """Return the head on `device`, detached."""
        bias = None if self.bias is None else self.bias.detach().to(device)
        return replace(self, weight=self.weight.detach().to(device), bias=bias, packed=None)

    def project(self, hidden_states: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return W h + b for the first `vocab_size` rows, `(N, H) -> (N, vocab_size)`."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        weight = self.weight[:vocab_size]
        if suits_onednn(hidden_states, weight):
            if self.packed is not None:
                return multiply(hidden_states, self.packed, self.bias)[..., :vocab_size]
            return multiply(hidden_states, weight, bias)
        return torch.nn.functional.linear(hidden_states.to(weight.dtype), weight, bias)

    def transform(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the logits, with scale and soft cap, in at least float32."""
        logits = projected.to(torch.promote_types(projected.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def transform_gradient(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """Turn the gradient of the logits into the gradient of the projection, in place.

        Raises:
            ValueError: for a head with a soft cap, if `logits` are missing.
        """
        if self.softcap is not None:
            if logits is None:
                raise TypeError(f"The gradient of a soft cap (softcap={self.softcap}) needs the logits.")
            gradient.mul_(1.0 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)

    def logits(self, hidden_states: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return the logits of the first `vocab_size` rows in at least float32, `(N, H) -> (N, vocab_size)`."""
        return self.transform(self.project(hidden_states, vocab_size))

    def teacher_logits(
        self, states: torch.Tensor, vocab_size: int, student_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits of a teacher with this head; those of the student are not needed."""
        return self.logits(states, vocab_size)


def _projection(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of an output projection with its adapters: W + s B A for LoRA.

    Only a teacher can have LoRA on its head. GRPOTrainer refuses students with an adapter there, except
    `modules_to_save`.
    """
    if type(module) is torch.nn.Linear:  # most heads are plain; importing peft would take seconds
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
                f"The adapter {adapter!r} on the LM head ({type(module).__name__}) is not supported: chunks of the "
                "head are computed from its weights, to which only plain LoRA can be added. Take the head out of "
                "target_modules, or put it into modules_to_save."
            )
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter)
    return weight, bias


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token, counted from the first token of its row that is not padding, `(B, L)`.

    Learned positions (GPT-2) would be wrong under left padding without it; rotary positions would not.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Return whether the architecture takes `position_ids`. BLOOM, for example, has ALiBi instead."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def cache_argument(model: PreTrainedModel) -> str:
    """Return under which name the model's forward pass takes the KV cache; transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """Return the causal language model inside a `PeftModel`, with its adapters; return other models unchanged.

    Raises:
        ValueError: for prompt learning, whose virtual tokens are not part of the inner model.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise UserError(
            f"{type(config).__name__} ({type(model).__name__}) is not supported: it adds virtual tokens before the "
            "prompt. Use LoRA."
        )
    return model.get_base_model()


def check_embedded(model: PreTrainedModel, token_ids: Iterable[Sequence[int]]) -> None:
    """Check that a model has an embedding for every token.

    Raises:
        ValueError: naming the highest token id.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if (highest := max(itertools.chain.from_iterable(token_ids), default=0)) >= rows:
        raise UserError(
            f"The tokenizer gives the token {highest} in a prompt, a reference or for padding, but the model has "
            f"{rows} embeddings only ({model.name_or_path!r}). Take the model's own tokenizer, or resize its "
            "embeddings."
        )


def completion_hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> torch.Tensor:
    """Return the last hidden states at the positions that predict the completion.

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
    # The last layer of a model with a device_map may be on another device than its first
    return hidden_states[:, -completion_length - 1 : -1].to(input_ids.device)


def rounding_tolerance(dtype: torch.dtype, roundings: int) -> float:
    """Return the largest difference, relative to the largest value, that `roundings` roundings in `dtype` can cause.

    At least 1e-3, since GPUs may round the factors of float32 products to ten bits (TF32).
    """
    return max(1e-3, roundings * torch.finfo(dtype).eps)


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Check on a short input that [`LMHead`] reproduces the model's own logits.

    A hook converts the output of the head's module to float32, so that the model's further transformation of it is
    compared more precisely than its weights would allow. The comparison is repeated with a 64 times larger output,
    where a soft cap shows.

    Raises:
        ValueError: if the logits differ, because the architecture transforms them in an unknown way and its scores
            would be silently wrong; or if the head is offloaded or sharded over processes; or if the
            architecture does not name its body.
    """
    if model.base_model is model:  # of which transformers returns the model itself
        raise UserError(
            f"The {name} ({type(model).__name__}) cannot be run without its LM head: its architecture does not name "
            f"its body (it has no attribute {model.base_model_prefix!r}). Choose a model of another architecture, "
            "see docs/models.md."
        )
    output: Any = model.get_output_embeddings()
    if isinstance(output.weight, DTensor) or output.weight.is_meta:
        where = "offloaded by its device_map" if output.weight.is_meta else "sharded over processes"
        raise UserError(
            f"The LM head of the {name} ({type(model).__name__}) is {where}, but each process needs all of it. "
            "Keep it on one device; to shard only the blocks, set shard_teacher=True."
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
