"""Estimate the memory of a run from the models' configurations, without allocating a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..models.fused_head import chunk_elements
from ..models.packed_weights import LEAST_ELEMENTS, LEAST_TOKENS
from ..rollouts.compiled_steps import static_columns

# Bytes per weight: full and half precision, and NF4 with its scales
_FULL, _HALF, _NF4 = 4.0, 2.0, 0.56


@dataclass(frozen=True)
class Workload:
    """The settings of a run that determine the memory of each process.

    Attributes:
        rows: completions of a micro-batch.
        sampled_rows: completions decoded together.
        buffered_rows: completions of a rollout buffer, whose teacher states are kept.
        prompt_tokens, completion_tokens: tokens of the longest prompt and completion.
        gradient_checkpointing: whether the backward pass recomputes activations.
        lora_rank: rank of a LoRA student with adapters on all linear layers; None for full fine-tuning.
        base_in_float32: whether the frozen base of a LoRA student is loaded in float32, the default without `dtype`.
        student_4bit, teacher_4bit: whether the frozen weights are NF4.
        keeps_states, keeps_teacher: whether the teacher's states, and the teacher, stay on the GPU in inner passes.
        strategy, processes: how the student is distributed ("ddp", "zero2", "zero3" or "fsdp"), over how many
            processes.
        shard_teacher, teacher_shares_base: as in [`MiniLLMConfig`].
        mixed_precision: whether teacher, caches and activations are in half precision; otherwise they are in float32.
        half_precision_rollouts: whether rollouts are sampled from a half-precision copy of the student.
        merged_rollouts: whether a LoRA student samples with its adapters merged, see [`MiniLLMConfig`].
        packs_weights: whether float32 weights are packed while sampling, as on x86 CPUs.
        teacher_samples: whether the teacher samples tokens (`teacher_mixed_alpha` > 0).
        compiles: whether decoding steps are compiled (`compile_rollouts`), whose tensors stay between rollouts.
        overlaps: whether the next rollout is sampled while updating (`overlap_rollouts`).
        rollout_device: as in [`MiniLLMConfig`].
    """

    rows: int
    sampled_rows: int
    buffered_rows: int
    prompt_tokens: int
    completion_tokens: int
    gradient_checkpointing: bool = True
    lora_rank: int | None = None
    base_in_float32: bool = False
    student_4bit: bool = False
    teacher_4bit: bool = False
    keeps_states: bool = True
    keeps_teacher: bool = True
    strategy: str = "ddp"
    processes: int = 1
    shard_teacher: bool = False
    teacher_shares_base: bool = False
    mixed_precision: bool = True
    half_precision_rollouts: bool = True
    merged_rollouts: bool = False
    packs_weights: bool = False
    teacher_samples: bool = True
    compiles: bool = False
    overlaps: bool = False
    rollout_device: str | None = None

    @property
    def width(self) -> float:
        """Bytes per number in the computation."""
        return _HALF if self.mixed_precision else _FULL


def count_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of the causal language model of a configuration, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def count_packed(config: PreTrainedConfig) -> int:
    """Count the weights of the linear layers, head included, that [`packed_weights`] packs in float32 on a CPU."""
    with torch.device("meta"):
        modules = list(AutoModelForCausalLM.from_config(config).modules())
    sizes = [module.weight.numel() for module in modules if type(module) in (torch.nn.Linear, Conv1D)]
    return sum(size for size in sizes if size >= LEAST_ELEMENTS)


def estimate_memory(student: PreTrainedConfig, teacher: PreTrainedConfig, load: Workload) -> dict[str, float]:
    """Estimate the bytes that MiniLLM with AdamW takes on each process, on its GPU if there is one.

    Counted are weights, optimizer states, the gradients of an update, activations (see `_activation_bytes`), and the
    half-precision weights that autocast caches for the backward pass; gradient checkpointing caches one layer's
    weights at a time. Not counted are fragmentation and what frameworks allocate themselves. On one GPU the estimate
    is within 10 % of the allocated memory (`benchmarks/memory_estimate.py`). We have not compared other strategies,
    NF4 and float32 bases.

    Returns:
        `dict[str, float]`: bytes by purpose, with the sums "while sampling" and "while updating". The two phases
        alternate; with `overlaps`, the second sum has both. With a `rollout_device`, a third sum says what is there,
        and the two others what is on the device that trains.
    """
    sizes = {"student": count_parameters(student), "teacher": count_parameters(teacher)}
    held, trained, copied = _trained_bytes(student, sizes["student"], load)
    copied = copied if load.rollout_device is None else _whole_copy_bytes(student, sizes["student"], load)
    packed = _packed_bytes(student, teacher, load)
    student, teacher = student.get_text_config(), teacher.get_text_config()
    states = load.buffered_rows * load.completion_tokens * teacher.hidden_size * load.width
    caches = _cache_bytes([student, teacher] if load.teacher_samples else [student], load)
    teacher_bytes = _teacher_bytes(teacher, sizes["teacher"], load)
    parts = {
        "student, gradients and optimizer": trained,
        "copy for rollouts": copied,
        "teacher": teacher_bytes,
        "key-value caches while sampling": caches,
        "teacher's states of a rollout": states,
        "activations of a micro-batch": _activation_bytes(student, load),
        "heads in chunks": _head_bytes(student, load),
    }
    merged = _merged_bytes(student, sizes["student"], load)
    for name, value in (("packed", packed), ("merged", merged)):
        if value > 0.0:
            parts[f"weights {name} while sampling"] = value
    if load.rollout_device is not None:
        kept = teacher.vocab_size * teacher.hidden_size * load.width + (states if load.keeps_states else 0.0)
        parts["while sampling"] = held + kept
        parts["while updating"] = trained + kept + parts["activations of a micro-batch"] + parts["heads in chunks"]
        there = copied + teacher_bytes + caches + states + packed + merged
        parts[f"on {load.rollout_device}, for the next rollout"] = there
        return parts
    parts["while sampling"] = held + copied + teacher_bytes + caches + states + packed + merged
    parts["while updating"] = (
        trained
        + (copied if load.compiles or not _is_sharded(load) else 0.0)
        + (caches + merged if load.compiles or load.overlaps else 0.0)
        + (packed + states if load.overlaps else 0.0)  # states of the next rollout, too
        + (teacher_bytes if load.keeps_teacher else teacher.vocab_size * teacher.hidden_size * load.width)
        + (states if load.keeps_states else 0.0)
        + parts["activations of a micro-batch"]
        + parts["heads in chunks"]
    )
    return parts


def estimate_fine_tuning_memory(
    model: PreTrainedConfig, load: Workload, teacher: PreTrainedConfig | None = None
) -> dict[str, float]:
    """Estimate the memory of fine-tuning on data (sft, and seqkd after sampling) or, with a `teacher`, of KD.

    Fine-tuning computes all logits at once, and its loss keeps three copies of them in float32. KD computes its heads
    in chunks.
    """
    size = count_parameters(model)
    held, trained, copied = _trained_bytes(model, size, load)
    copied = copied if _is_sharded(load) else 0.0  # a model that is not sharded samples without a copy
    text = model.get_text_config()
    tokens = load.prompt_tokens + load.completion_tokens
    teacher_bytes, head = 0.0, 3 * load.rows * tokens * text.vocab_size * 4.0
    if teacher is not None:
        teacher_bytes = _teacher_bytes(teacher.get_text_config(), count_parameters(teacher), load)
        head = _head_bytes(text, load)
    caches = load.sampled_rows * tokens * _cache_width(text) * load.width
    parts = {
        "student, gradients and optimizer": trained,
        "teacher": teacher_bytes,
        "activations of a micro-batch": _activation_bytes(text, load),
        "logits": head,
    }
    return parts | {
        "while sampling": held + teacher_bytes + copied + caches,
        "while updating": trained + teacher_bytes + parts["activations of a micro-batch"] + head,
    }


def _has_wide_base(load: Workload) -> bool:
    """Return whether the frozen base is in float32. DeepSpeed keeps all weights in half precision."""
    return load.base_in_float32 and not load.student_4bit and load.strategy in ("ddp", "fsdp")


def _is_sharded(load: Workload) -> bool:
    return load.strategy in ("fsdp", "zero3")


def _trained_bytes(config: PreTrainedConfig, size: int, load: Workload) -> tuple[float, float, float]:
    """Return the student's bytes between updates and during updates, and the bytes of its copy for rollouts."""
    text = config.get_text_config()
    if load.lora_rank is None:
        frozen, trained, copied = 0.0, float(size), size * _HALF
    else:
        wide = _has_wide_base(load)
        frozen = _nf4_bytes(text, size) if load.student_4bit else size * (4.0 if wide else _HALF)
        trained = _adapter_weights(text, load)
        # a base in half precision is shared with the copy
        copied = trained * _HALF + (size * _HALF if wide or _is_sharded(load) else 0.0)
    if load.strategy == "zero2":  # each process has all half-precision weights, and samples from them
        updating = trained * (_HALF + 14.0 / load.processes) + frozen
        return updating, updating, 0.0
    if _is_sharded(load):  # float32 weights and two moments take 12 bytes, gradients 4 more
        return (trained * 12.0 + frozen) / load.processes, (trained * 16.0 + frozen) / load.processes, copied
    copied = copied if load.half_precision_rollouts else trained * _FULL if load.overlaps else 0.0
    cast = _HALF if load.mixed_precision and not load.gradient_checkpointing else 0.0
    return trained * 12.0 + frozen, trained * (16.0 + cast) + frozen, copied


def _whole_copy_bytes(config: PreTrainedConfig, size: int, load: Workload) -> float:
    """Return the bytes of a student's copy that shares no weight with it."""
    is_wide = load.lora_rank is None or _has_wide_base(load)
    copied = size * (_FULL if is_wide and not load.half_precision_rollouts else _HALF)
    return copied if load.lora_rank is None else copied + _adapter_weights(config.get_text_config(), load) * _FULL


def _adapter_weights(text: PreTrainedConfig, load: Workload) -> float:
    """Return the most weights that adapters on all linear layers have.

    A layer has about 12 H^2 weights in matrices of width H to 4 H, so adapters have at most 2 r (H + 4 H) x 3.
    """
    assert load.lora_rank is not None, "only for a student with adapters"
    return text.num_hidden_layers * 30.0 * text.hidden_size * load.lora_rank


def _cache_bytes(samplers: Sequence[PreTrainedConfig], load: Workload) -> float:
    """Return the bytes of the keys and values of a batch that is sampled, of all models that sample.

    Compiled steps have a power of two of columns, and keep the last hidden states of each.
    """
    tokens, widths = load.prompt_tokens + load.completion_tokens, [_cache_width(config) for config in samplers]
    if load.compiles:
        tokens = static_columns(tokens)
        widths += [config.hidden_size for config in samplers]
    return load.sampled_rows * tokens * sum(widths) * load.width


def _merged_bytes(text: PreTrainedConfig, size: int, load: Workload) -> float:
    """Return the bytes of weights with merged adapters, beyond those of the copy for rollouts."""
    is_copied = _is_sharded(load) or (_has_wide_base(load) and load.half_precision_rollouts)
    is_copied |= load.rollout_device is not None
    if load.lora_rank is None or load.student_4bit or not load.merged_rollouts or is_copied:
        return 0.0
    return (size - _end_parameters(text)) * (_FULL if _has_wide_base(load) else load.width)


def _teacher_bytes(text: PreTrainedConfig, size: int, load: Workload) -> float:
    if load.teacher_shares_base:
        return 0.0
    whole = _nf4_bytes(text, size) if load.teacher_4bit else size * load.width
    if not load.shard_teacher:
        return whole
    ends = _end_parameters(text) * load.width  # embeddings and head stay whole on each process
    return ends + (whole - ends) / load.processes


def _packed_bytes(student: PreTrainedConfig, teacher: PreTrainedConfig, load: Workload) -> float:
    """Return the bytes of packed weights, which exist while float32 models sample that are not sharded."""
    is_whole = not (load.shard_teacher or _is_sharded(load))
    if not (load.packs_weights and is_whole and load.width == _FULL and load.completion_tokens >= LEAST_TOKENS):
        return 0.0
    is_wide = load.lora_rank is None or load.base_in_float32
    packs_student = is_wide and not (load.student_4bit or load.half_precision_rollouts)
    merges = load.merged_rollouts and load.lora_rank is not None  # into weights of the student alone
    shares = load.teacher_shares_base and packs_student and not merges
    packs_teacher = load.teacher_samples and not (load.teacher_4bit or shares)
    models = [(student, packs_student), (teacher, packs_teacher)]
    return _FULL * sum(count_packed(config) for config, is_packed in models if is_packed)


def _nf4_bytes(text: PreTrainedConfig, size: int) -> float:
    """Return the bytes of a model in NF4. bitsandbytes does not quantise embeddings and head."""
    ends = _end_parameters(text)
    return (size - ends) * _NF4 + ends * _HALF


def _end_parameters(text: PreTrainedConfig) -> int:
    """Count the parameters of embeddings and head."""
    return (1 if text.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size


def _activation_bytes(text: PreTrainedConfig, load: Workload) -> float:
    """Return the bytes that the layers keep for the backward pass.

    Under autocast the residual stream has the dtype of the embeddings. For each token and unit of hidden width, a
    layer keeps about 20 bytes of norms, queries and outputs, 14 bytes of keys and values, and 8 bytes for each unit of
    its feed-forward part: half precision before and after the activation, twice for a gate. transformers computes
    `gelu_new` partly in float32, hence 15 bytes. Without mixed precision everything has twice the size.
    """
    heads = text.num_attention_heads
    kv_share = (getattr(text, "num_key_value_heads", None) or heads) / heads
    is_partly_full = load.mixed_precision and getattr(text, "activation_function", None) == "gelu_new"
    unit = 15.0 if is_partly_full else 8.0
    widths = [getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    feed_forward = next((width for width in widths if width), 4 * text.hidden_size) / text.hidden_size
    layer = (20.0 + 14.0 * kv_share + unit * feed_forward) * load.width / _HALF
    position = load.rows * (load.prompt_tokens + load.completion_tokens) * text.hidden_size
    if not load.gradient_checkpointing:
        return position * layer * text.num_hidden_layers
    residual = _FULL if load.lora_rank is None or _has_wide_base(load) else load.width
    return position * (residual * text.num_hidden_layers + layer)


def _head_bytes(text: PreTrainedConfig, load: Workload) -> float:
    """Return the bytes of a head in chunks: about four float32 tensors of one chunk, and the gradient of the head.

    A LoRA student's head is frozen: it has no gradient.
    """
    gradient = text.vocab_size * text.hidden_size if load.lora_rank is None else 0
    return 4 * chunk_elements(gradient) * 4.0 + gradient * 4.0


def _cache_width(config: PreTrainedConfig) -> int:
    """Count the numbers that a token adds to the key-value cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width
