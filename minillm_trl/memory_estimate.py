"""An estimate of the GPU memory that a run takes, from the models' configurations alone."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .fused_head import CHUNK_ELEMENTS

# Bytes a weight: half precision, and NF4 with its scales
_HALF, _NF4 = 2.0, 0.56


@dataclass(frozen=True)
class Workload:
    """What of a run decides its memory, on each process.

    Attributes:
        rows: completions of a micro-batch.
        sampled_rows: completions that are decoded together.
        buffered_rows: completions of a rollout buffer, whose teacher states are kept.
        prompt_tokens, completion_tokens: of the longest prompt and completion.
        gradient_checkpointing: whether activations are computed anew in the backward pass.
        lora_rank: of a LoRA student on all linear layers; None for a student that is trained as a whole.
        student_4bit, teacher_4bit: whether the frozen weights are NF4.
        keeps_states, keeps_teacher: whether the teacher's states, and the teacher, are on the GPU in inner passes.
        strategy, processes: what the student is trained under ("ddp", "zero2", "zero3" or "fsdp"), and by how many.
        shard_teacher, teacher_shares_base: as in [`MiniLLMConfig`].
    """

    rows: int
    sampled_rows: int
    buffered_rows: int
    prompt_tokens: int
    completion_tokens: int
    gradient_checkpointing: bool = True
    lora_rank: int | None = None
    student_4bit: bool = False
    teacher_4bit: bool = False
    keeps_states: bool = True
    keeps_teacher: bool = True
    strategy: str = "ddp"
    processes: int = 1
    shard_teacher: bool = False
    teacher_shares_base: bool = False


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of the causal language model that a configuration describes; none is allocated."""
    with torch.device("meta"):
        return sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())


def estimate_memory(student: PreTrainedConfig, teacher: PreTrainedConfig, load: Workload) -> dict[str, float]:
    """Bytes on the GPU of each process in mixed precision with AdamW, by what takes them.

    Weights, gradients and optimizer states are counted; activations are the usual 34 bytes a token, layer and unit of
    width (2 with gradient checkpointing, and one layer's 34). What a framework needs besides, and fragmentation, come
    on top. Not compared with a run on a GPU yet.

    Returns:
        `dict[str, float]`: rollout and update never run at once; each has its sum.
    """
    sizes = {"student": count_parameters(student), "teacher": count_parameters(teacher)}
    student, teacher = student.get_text_config(), teacher.get_text_config()
    sharded = load.strategy in ("fsdp", "zero3")
    if load.lora_rank is None:
        frozen, trained, copied = 0.0, float(sizes["student"]), sizes["student"] * _HALF
    else:
        frozen = sizes["student"] * (_NF4 if load.student_4bit else _HALF)
        # about 12 H^2 weights a layer in matrices of width H to 4 H: 2 r (H + 4 H) x 3 or less of adapters
        trained = student.num_hidden_layers * 30.0 * student.hidden_size * load.lora_rank
        copied = trained * _HALF + (frozen if sharded else 0.0)
    if load.strategy == "zero2":  # half-precision weights on each process, in which it samples as well
        trained, copied = trained * (_HALF + 14.0 / load.processes), 0.0
    else:  # float32 weights, gradients and two moments
        trained *= 16.0
    if sharded:
        frozen, trained = frozen / load.processes, trained / load.processes
    trained += frozen
    tokens = load.prompt_tokens + load.completion_tokens
    position = load.rows * tokens * student.hidden_size
    layers = student.num_hidden_layers
    activations = position * (2 * layers + 34 if load.gradient_checkpointing else 34 * layers)
    teacher_bytes = 0.0 if load.teacher_shares_base else sizes["teacher"] * (_NF4 if load.teacher_4bit else _HALF)
    head = teacher.vocab_size * teacher.hidden_size * _HALF
    if load.shard_teacher:  # all but head and embeddings
        tied = 1 if teacher.tie_word_embeddings else 2
        teacher_bytes = tied * head + (teacher_bytes - tied * head) / load.processes
    states = load.buffered_rows * load.completion_tokens * teacher.hidden_size * _HALF
    caches = load.sampled_rows * tokens * (_cache_width(student) + _cache_width(teacher)) * _HALF
    parts = {
        "student, gradients and optimizer": trained,
        "copy for rollouts": copied,
        "teacher": teacher_bytes,
        "key-value caches while sampling": caches,
        "teacher's states of a rollout": states,
        "activations of a micro-batch": activations,
        "heads in chunks": 4 * CHUNK_ELEMENTS * 4.0 + student.vocab_size * student.hidden_size * 4.0,
    }
    parts["while sampling"] = trained + copied + teacher_bytes + caches + states
    parts["while updating"] = (
        trained
        + (0.0 if sharded else copied)
        + (teacher_bytes if load.keeps_teacher else head)
        + (states if load.keeps_states else 0.0)
        + parts["activations of a micro-batch"]
        + parts["heads in chunks"]
    )
    return parts


def _cache_width(config: PreTrainedConfig) -> int:
    """Numbers that a token adds to the cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width
