"""Checks of the models that sample rollouts, and the choice of what is compiled."""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import MiniLLMConfig
from ..models.teacher import is_split
from ..rollouts.compiled_sampling import check_compiled_decoding
from ..rollouts.compiled_steps import CompiledDecoding
from ..rollouts.decoding import check_decoding
from ..rollouts.rollout_teacher import RolloutTeacher, Teacher

logger = logging.get_logger(__name__)


def prepare_decoding(
    student: PreTrainedModel, teacher: Teacher, args: MiniLLMConfig, decodes: bool
) -> CompiledDecoding | None:
    """Check that the models can be decoded with a cache, and compile their steps on request.

    Args:
        student ([`~transformers.PreTrainedModel`]): the model that samples.
        teacher ([`Teacher`]): that of the run.
        args ([`MiniLLMConfig`]): those of the trainer.
        decodes (`bool`): whether rollouts come from this package's own loops.

    Raises:
        ValueError: naming the model that these loops would sample from wrongly.
    """
    # a student that DeepSpeed or FSDP will place is still on the CPU
    backend = compile_backend(args.compile_rollouts, args.device)
    compiled = None if backend is None else CompiledDecoding(student, backend, _teacher_to_compile(teacher, args))
    if decodes:
        check_decoding(student, "student")
        for model in teacher.models if args.teacher_mixed_alpha > 0 else []:
            check_decoding(model, "teacher")
        for model, name in zip(compiled.models if compiled else [], ("student", "teacher"), strict=False):
            check_compiled_decoding(model, name)
    return compiled


def compile_backend(requested: str | None, device: torch.device) -> str | None:
    """Return the backend of `torch.compile` that `compile_rollouts` asks for, or None for none.

    `"auto"` chooses `"inductor"` on GPUs from compute capability 8.0 on where Triton is installed, CUDA graphs on
    other GPUs, and nothing on a CPU, where compilation takes longer than it saves in most runs.
    """
    if requested != "auto":
        return requested
    backend = None
    if device.type == "cuda":
        is_new = torch.cuda.get_device_capability(device) >= (8, 0)
        backend = "inductor" if is_new and find_spec("triton") else "cudagraphs"
    logger.warning(f"compile_rollouts='auto': chose {backend!r} on {device.type}.")
    return backend


def _teacher_to_compile(teacher: Teacher, args: MiniLLMConfig) -> PreTrainedModel | None:
    """Return the teacher if it draws tokens and its steps can be compiled.

    CUDA graphs need its weights at their addresses on a single device, and all processes need a sharded teacher at the
    same time.
    """
    if args.teacher_mixed_alpha == 0 or args.offload_teacher or args.teacher_shares_base:
        return None
    if not isinstance(teacher, RolloutTeacher) or teacher.is_sharded or is_split(teacher.model):
        return None
    is_plain = type(teacher.model.get_output_embeddings()) is torch.nn.Linear
    is_quantised = getattr(teacher.model, "is_quantized", False)
    return teacher.model if is_plain and not is_quantised else None
