"""Check models that must equal the initial student: the reference of `beta`, and a base that the teacher shares."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from ..errors import UserError
from .student_copy import shards_student

if TYPE_CHECKING:
    from peft import PeftConfig

# LoRA initialisations that subtract the new adapter from the base's weights
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Nats per token; adapters that start as an identity up to rounding (DoRA, Householder reflections) stay below
_TOLERANCE = {"float32": 1e-6, "half precision": 1e-2}


def rewriting_init(config: "PeftConfig") -> str | None:
    """Return `init_lora_weights` if it changes the weights of the base; otherwise None."""
    init = getattr(config, "init_lora_weights", None)
    return init if isinstance(init, str) and init.startswith(_REWRITING) else None


def check_adapters(configs: Iterable["PeftConfig"], beta: float, teacher_shares_base: bool) -> None:
    """Check that a student's adapters do not change a base that the reference or the teacher uses.

    Args:
        configs (`Iterable`): configurations of the student's adapters.
        beta (`float`): weight of the KL to the initial student.
        teacher_shares_base (`bool`): whether the teacher is an adapter on the same base.

    Raises:
        ValueError: naming the adapter's setting, the user of the base, and the fix.
    """
    for config in configs:
        if init := rewriting_init(config):
            if teacher_shares_base:
                raise UserError(
                    f"peft_config.init_lora_weights={init!r} changes the base's weights, and so would change the "
                    "teacher, whose adapter shares them. Set init_lora_weights=True (or 'gaussian', 'orthogonal'), or "
                    "teacher_shares_base=False."
                )
            if beta > 0:
                raise UserError(
                    f"beta={beta}: the reference is the student without its adapter, but "
                    f"peft_config.init_lora_weights={init!r} changes these weights. Set init_lora_weights=True (or "
                    "'gaussian', 'orthogonal'), or beta=0.0. If the student already has such an adapter, merge it "
                    "first."
                )
        if teacher_shares_base and (layers := getattr(config, "layer_replication", None)):
            raise UserError(
                f"peft_config.layer_replication={layers} repeats layers of the base, and so would change the teacher, "
                "whose adapter shares them. Drop it, or set teacher_shares_base=False."
            )


def check_teacher_adapter(config: "PeftConfig", name: str) -> None:
    """Check that a teacher's adapter can be loaded on the student's base without changing it.

    Raises:
        ValueError: naming its setting and the fix.
    """
    if init := rewriting_init(config):
        raise UserError(
            f"teacher_shares_base=True: the teacher's adapter {name!r} has init_lora_weights={init!r}, which changes "
            "the student's base too. Convert it to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion), or set teacher_shares_base=False."
        )


def check_reference(student: torch.nn.Module, ref_model: PreTrainedModel | None, accelerator: Accelerator) -> None:
    """Check that the reference equals the student before training, and that training will not change it.

    Args:
        student (`torch.nn.Module`): the student, not wrapped. With adapters, the reference is its adapter `ref`, or
            the student without adapters if it has no such adapter.
        ref_model ([`~transformers.PreTrainedModel`], *optional*): the reference of a student without adapters. It is
            not compared if it is sharded (ZeRO-3, FSDP).
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.

    Raises:
        ValueError: with the divergence, or the name of a trained weight that the reference uses too, and the fix.
    """
    if ref_model is not None and shards_student(accelerator):
        return
    training = student.training
    student.eval()
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    # Both in autocast, since GRPOTrainer has prepared `ref_model` to compute in mixed precision
    with gathered(student), torch.no_grad(), accelerator.autocast():
        start = _log_probs(student)
    with gathered(student), _as_reference(student, ref_model) as reference, accelerator.autocast():
        for parameter in trained.values():
            parameter.requires_grad_(True)  # PEFT freezes inactive adapters
        log_probs = _log_probs(reference)
        moving = [] if ref_model is not None else _moving_weights(log_probs, trained)
    student.train(training)
    divergence = (start.exp() * (start - log_probs.detach())).sum(dim=-1).mean().item()
    is_half = [parameter.dtype.itemsize <= 2 for parameter in student.parameters()]
    half = accelerator.mixed_precision != "no" or any(is_half)
    if not divergence <= _TOLERANCE["half precision" if half else "float32"]:
        raise UserError(
            f"beta: {_difference(student, ref_model)}, or set beta=0.0. The KL is {divergence:.2g} nats per token."
        )
    if moving:
        raise UserError(
            f"beta: training would change the reference, the student without its adapter: {moving[0]} is trained and "
            f"part of both{_settings(student, 'bias')}. Set bias='none' in peft_config and train only the adapter's "
            "own weights, or set beta=0.0."
        )


def _difference(student: Any, ref_model: PreTrainedModel | None) -> str:
    """Explain how the reference differs from the student, and how to fix that."""
    if ref_model is not None:
        return (
            f"the reference was loaded from the student's original folder or name ({student.config._name_or_path!r}), "
            "but the student has changed since it was loaded. Save the student and pass its folder"
        )
    return (
        "the reference is the student without its adapter, but the adapter changes the student from the start"
        f"{_settings(student, 'init_lora_weights', 'init_weights')}. Choose an adapter that changes nothing at first"
    )


def _settings(student: Any, *names: str) -> str:
    """Return the type of the active adapter and those of its fields `names` that it has, in parentheses."""
    config = student.active_peft_config
    found = [f"{name}={getattr(config, name)!r}" for name in names if hasattr(config, name)]
    return f" ({config.peft_type.value}, {', '.join(found)})" if found else f" ({config.peft_type.value})"


@contextmanager
def _as_reference(student: Any, ref_model: PreTrainedModel | None) -> Iterator[torch.nn.Module]:
    """Yield the model that GRPOTrainer uses as the reference."""
    if ref_model is not None:
        yield ref_model
        return
    with use_adapter(student, adapter_name="ref" if "ref" in student.peft_config else None):
        yield student


def _moving_weights(log_probs: torch.Tensor, trained: dict[str, torch.nn.Parameter]) -> list[str]:
    """Return the names of the trained weights that the reference's `log_probs` depend on."""
    if not log_probs.requires_grad:
        return []
    gradients = torch.autograd.grad(log_probs.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]


def _log_probs(model: Any) -> torch.Tensor:
    """Return the log-probs on a short input, of shape `(1, 16, V)`."""
    ids = torch.arange(1, 17, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float().log_softmax(dim=-1)


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Gather weights that ZeRO-3 has sharded, inside the block; all processes must enter it together."""
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    with ExitStack() as stack:
        if sharded:
            import deepspeed  # an optional dependency

            stack.enter_context(deepspeed.zero.GatheredParameters(sharded))
        yield
