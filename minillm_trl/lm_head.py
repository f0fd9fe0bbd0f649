"""The two parts of a causal language model that are run apart: its body, and the head that projects to logits."""

import inspect
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


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
        """Read the head of `model` as it stands now (sharding wrappers may replace its tensors between calls)."""
        projection = model.get_output_embeddings()
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        bias = getattr(projection, "bias", None)
        return cls(projection.weight, bias, scale, getattr(config, "final_logit_softcapping", None))

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


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each real token counted from its row's first real token, `(B, L) -> (B, L)`.

    Learned positions (GPT-2) are wrong under left padding without it; rotary ones do not care.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Whether the architecture takes `position_ids` (BLOOM's ALiBi, for one, has no positions to pass)."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


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
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if accepts_position_ids(model):
        inputs["position_ids"] = position_ids(attention_mask)
    hidden_states = model.base_model(**inputs).last_hidden_state
    return hidden_states[:, -completion_length - 1 : -1]


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Check on a short input that [`LMHead`] reproduces the model's own logits.

    Raises:
        ValueError: if it does not, because the architecture transforms its logits in a way that is unknown here.
            Scoring such a model would be silently wrong. Also if the head is sharded over processes.
    """
    if isinstance(model.get_output_embeddings().weight, DTensor):
        raise ValueError(
            f"The LM head of the {name} ({type(model).__name__}) is sharded over processes, but each needs all of it. "
            "Shard the blocks of the model alone (fully_shard on each layer, not on the model)."
        )
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    hidden_states = completion_hidden_states(model, ids, mask, ids.shape[1] - 1)
    actual = LMHead.of(model).logits(hidden_states, expected.shape[-1])
    model.train(training)
    error = (actual - expected).abs().max().item()
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    if not error <= tolerance * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"The LM head of the {name} ({type(model).__name__}) is not reproduced by minillm_trl: logits differ by "
            f"up to {error:.2g}. Its architecture transforms hidden states or logits in a way that is not supported."
        )
