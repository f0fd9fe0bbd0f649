"""What the KL of `beta` refers to, and the base that a teacher's adapter shares: both must be as the student began."""

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

# Initialisations of LoRA that subtract the new adapter from the weights of its base
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Nats per token. Adapters that start as an identity up to rounding (DoRA, Householder reflections) stay below.
_TOLERANCE = {"float32": 1e-6, "half precision": 1e-2}


def rewriting_init(config: "PeftConfig") -> str | None:
    """Return the `init_lora_weights` of an adapter that changes the weights of its base; None for other adapters."""
    init = getattr(config, "init_lora_weights", None)
    return init if isinstance(init, str) and init.startswith(_REWRITING) else None


def check_adapters(configs: Iterable["PeftConfig"], beta: float, teacher_shares_base: bool) -> None:
    """Check that the base of a student's adapters is left as it is, where something else relies on it.

    Args:
        configs (`Iterable`): of the student's adapters.
        beta (`float`): weight of the KL to the student as it was.
        teacher_shares_base (`bool`): whether the teacher is an adapter on the same base.

    Raises:
        ValueError: naming the setting of the adapter, what relies on the base, and the fix.
    """
    for config in configs:
        if init := rewriting_init(config):
            if teacher_shares_base:
                raise UserError(
                    f"peft_config.init_lora_weights={init!r} changes the base's weights, on which the teacher's "
                    "adapter would then be another teacher. Set init_lora_weights=True (or 'gaussian', 'orthogonal'), "
                    "or teacher_shares_base=False."
                )
            if beta > 0:
                raise UserError(
                    f"beta={beta}: its KL refers to the student without its adapter, whose weights "
                    f"peft_config.init_lora_weights={init!r} changes. Set init_lora_weights=True (or 'gaussian', "
                    "'orthogonal'), or beta=0.0. A student that has such an adapter already is to be merged first."
                )
        if teacher_shares_base and (layers := getattr(config, "layer_replication", None)):
            raise UserError(
                f"peft_config.layer_replication={layers} repeats layers of the base, on which the teacher's adapter "
                "would then be another teacher. Drop it, or set teacher_shares_base=False."
            )


def check_teacher_adapter(config: "PeftConfig", name: str) -> None:
    """Check that a teacher's adapter can be loaded on the student's base without changing it.

    Raises:
        ValueError: naming its setting and the fix.
    """
    if init := rewriting_init(config):
        raise UserError(
            f"teacher_shares_base=True: the teacher's adapter {name!r} has init_lora_weights={init!r}, which changes "
            "the base's weights, and so the student. Convert it to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion), or set teacher_shares_base=False."
        )


def check_reference(student: torch.nn.Module, ref_model: PreTrainedModel | None, accelerator: Accelerator) -> None:
    """Check that the reference is the student as it is before training, and that training will not move it.

    Args:
        student (`torch.nn.Module`): the student, not wrapped. With adapters the reference is its adapter `ref`, or
            else the student without adapters.
        ref_model ([`~transformers.PreTrainedModel`], *optional*): the reference of a student without adapters. Sharded
            ones (ZeRO-3, FSDP) are not compared.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.

    Raises:
        ValueError: with the divergence, or the name of a trained weight that the reference has too, and the fix.
    """
    if ref_model is not None and shards_student(accelerator):
        return
    training = student.training
    student.eval()
    trained = {name: each for name, each in student.named_parameters() if each.requires_grad}
    # GRPOTrainer has prepared `ref_model` to compute in mixed precision
    with gathered(student), torch.no_grad(), accelerator.autocast():
        start = _log_probs(student)
    with gathered(student), _as_reference(student, ref_model) as reference, accelerator.autocast():
        for each in trained.values():
            each.requires_grad_(True)  # PEFT freezes adapters that are not active
        log_probs = _log_probs(reference)
        moved = [] if ref_model is not None else _that_move(log_probs, trained)
    student.train(training)
    divergence = (start.exp() * (start - log_probs.detach())).sum(dim=-1).mean().item()
    half = accelerator.mixed_precision != "no" or any(each.dtype.itemsize <= 2 for each in student.parameters())
    if not divergence <= _TOLERANCE["half precision" if half else "float32"]:
        raise UserError(
            f"beta: {_what_differs(student, ref_model)}, or set beta=0.0. The KL is {divergence:.2g} nats a token."
        )
    if moved:
        raise UserError(
            f"beta: training would move the reference, the student without its adapter, since {moved[0]} is trained "
            f"and part of both{_settings(student, 'bias')}. Set bias='none' in peft_config and train the adapter's "
            "own weights alone, or set beta=0.0."
        )


def _what_differs(student: torch.nn.Module, ref_model: PreTrainedModel | None) -> str:
    if ref_model is not None:
        return (
            "the reference was loaded from where the student came from "
            f"({student.config._name_or_path!r}), but this student is another by now. Save it and pass the folder"
        )
    return (
        "the reference is the student without its adapter, which is not what the student starts as"
        f"{_settings(student, 'init_lora_weights', 'init_weights')}. Choose an adapter that changes nothing at first"
    )


def _settings(student: torch.nn.Module, *names: str) -> str:
    """The fields `names` of the active adapter that it has, in parentheses."""
    config = student.active_peft_config
    found = [f"{name}={getattr(config, name)!r}" for name in names if hasattr(config, name)]
    return f" ({config.peft_type.value}, {', '.join(found)})" if found else f" ({config.peft_type.value})"


@contextmanager
def _as_reference(student: torch.nn.Module, ref_model: PreTrainedModel | None) -> Iterator[torch.nn.Module]:
    """The model that GRPOTrainer takes for the reference."""
    if ref_model is not None:
        yield ref_model
        return
    with use_adapter(student, adapter_name="ref" if "ref" in student.peft_config else None):
        yield student


def _that_move(log_probs: torch.Tensor, trained: dict[str, torch.nn.Parameter]) -> list[str]:
    """Names of the trained weights that `log_probs` depend on."""
    if not log_probs.requires_grad:
        return []
    gradients = torch.autograd.grad(log_probs.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]


def _log_probs(model: Any) -> torch.Tensor:
    """Log-probs on a short input, of shape `(1, 16, V)`."""
    ids = torch.arange(1, 17, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float().log_softmax(dim=-1)


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Have the weights of a model whole that ZeRO-3 has spread over the processes; all must enter together."""
    spread = [each for each in model.parameters() if hasattr(each, "ds_id")]
    with ExitStack() as stack:
        if spread:
            import deepspeed  # an optional dependency

            stack.enter_context(deepspeed.zero.GatheredParameters(spread))
        yield
