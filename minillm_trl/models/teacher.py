"""Load, freeze and place the teacher, and check that it fits the student."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import cached_file, find_adapter_config_file

from ..errors import UserError
from ..hardware.processes import count_local_processes
from ..rollouts.buffer import parts_by_length
from .bitsandbytes_layout import keep_4bit_layout
from .encoding import encode_texts
from .end_tokens import adopt_generation_config
from .init_kwargs import with_dtype
from .lm_head import completion_hidden_states, without_wrapper
from .pickled_weights import refuse_pickled_weights
from .reference import check_teacher_adapter
from .student_copy import copy_modules
from .trained_products import use_onednn_products
from .weight_formats import quantization_settings

if TYPE_CHECKING:
    from peft import PeftModel

# Both tokenizers encode this text: equal vocabularies may still differ in merges, normalisation or pre-tokenization
PROBE_TEXT = "Below is an instruction.\n\n### Response:\n  1234 isn't 'naïve' — 東京\t☂️ e-mail: a_b@c.org\r\n"


def load_teacher(
    teacher_model: str | PreTrainedModel,
    init_kwargs: dict[str, Any] | None,
    default_dtype: torch.dtype,
    trust_remote_code: bool = False,
    allow_pickled_weights: bool = False,
) -> PreTrainedModel:
    """Load the teacher, unless it is a model already, freeze it and switch off its dropout.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a name on the hub, a
            folder, or a model.
        init_kwargs (`dict`, *optional*): keyword arguments of `from_pretrained`; only for a name or folder.
        default_dtype (`torch.dtype`): dtype of the weights unless `init_kwargs` has a `dtype`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the weights may run;
            `init_kwargs` has priority.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`): whether the weights may be pickles, see
            [`refuse_pickled_weights`].

    Returns:
        [`~transformers.PreTrainedModel`] in eval mode, with all parameters frozen.

    Raises:
        ValueError: if `init_kwargs` are given for a teacher that is loaded already, or the weights are pickles.
    """
    if isinstance(teacher_model, str):
        kwargs = with_dtype(init_kwargs) or {}
        kwargs.setdefault("dtype", default_dtype)
        kwargs.setdefault("trust_remote_code", trust_remote_code)
        if not allow_pickled_weights:
            refuse_pickled_weights(teacher_model, kwargs)
            kwargs["use_safetensors"] = True
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("load_in_4bit") and kwargs["dtype"] != "auto":
            # By default, 4-bit layers compute in float32
            kwargs["quantization_config"] = {"bnb_4bit_compute_dtype": kwargs["dtype"], **quantization}
        loaded = AutoModelForCausalLM.from_pretrained(teacher_model, **kwargs)
        if find_adapter_config_file(teacher_model) is not None:
            adopt_generation_config(loaded, teacher_model)
        teacher_model = loaded
    elif init_kwargs:
        raise UserError(
            f"teacher_model_init_kwargs={init_kwargs} has no effect on a teacher_model that is already loaded. Pass "
            "the teacher's name or folder, or drop teacher_model_init_kwargs."
        )
    return without_wrapper(teacher_model).eval().requires_grad_(False)


def adapter_on_base(student: "PeftModel", adapter: str | PreTrainedModel) -> PreTrainedModel:
    """Build a teacher from the adapter `adapter` on the base of `student`, whose weights are in memory only once.

    Student and teacher have separate modules around the same tensors, each with its own adapter. So no adapters are
    switched during training, and `requires_grad` of the student is not touched.

    Args:
        student ([`~peft.PeftModel`]): the student with its adapter, not wrapped.
        adapter (`str`): name on the hub or folder of the teacher's adapter; a loaded model is rejected.

    Raises:
        ValueError: if the student is not a PEFT model or trains weights of its base, or if the adapter was made for
            another base or would change it.
    """
    if not isinstance(adapter, str):
        raise UserError("teacher_shares_base=True needs the name or folder of the teacher's adapter as teacher_model.")
    from peft import PeftConfig, PeftModel  # takes seconds, and most teachers have no adapter

    if not isinstance(student, PeftModel):
        raise UserError("teacher_shares_base=True needs a student with an adapter: pass peft_config (--use_peft).")
    config = PeftConfig.from_pretrained(adapter)
    check_teacher_adapter(config, adapter)
    made_for, base_name = config.base_model_name_or_path, student.config._name_or_path
    if made_for and base_name and os.path.realpath(made_for) != os.path.realpath(base_name):
        raise UserError(
            f"The teacher's adapter {adapter!r} was made for {made_for!r}, but the student's base is {base_name!r}. "
            "Start the student from that base, or set teacher_shares_base=False."
        )
    # Deleting the student's adapters from the copy freezes their tensors, so the copy gets empty tensors instead
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    empty = {id(parameter): torch.nn.Parameter(torch.empty_like(parameter)) for parameter in trained}
    teacher: Any = copy_modules(student, empty)
    student_adapters = list(teacher.peft_config)
    teacher.load_adapter(adapter, "teacher", is_trainable=False)
    teacher.set_adapter("teacher", inference_mode=True)
    for name in student_adapters:
        teacher.delete_adapter(name)
    # An empty tensor that is still there replaced a trained weight of the base
    replaced = {id(parameter) for parameter in empty.values()}
    left = [name for name, parameter in teacher.named_parameters() if id(parameter) in replaced]
    if left:
        raise UserError(
            f"teacher_shares_base=True needs a frozen base, but the student trains {left[0]!r}. Set bias='none' in "
            "peft_config, or teacher_shares_base=False."
        )
    base = teacher.get_base_model().eval()
    adopt_generation_config(base, adapter)
    return base


@contextmanager
def one_process_at_a_time(accelerator: Accelerator) -> Iterator[None]:
    """Run the block on one process of a machine after another, as all at once would exceed its memory."""
    number = count_local_processes(accelerator.num_processes)
    for _ in range(accelerator.local_process_index):
        accelerator.wait_for_everyone()
    yield
    for _ in range(number - accelerator.local_process_index):
        accelerator.wait_for_everyone()


@contextmanager
def whole_weights(plugin: DeepSpeedPlugin | None) -> Iterator[None]:
    """Keep `from_pretrained` from sharding models inside the block, which it does while ZeRO-3 is configured."""
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def place_new_teacher(
    teacher_model: str | PreTrainedModel,
    accelerator: Accelerator,
    *,
    init_kwargs: dict[str, Any] | None,
    default_dtype: torch.dtype,
    shard: bool = False,
    trust_remote_code: bool = False,
    allow_pickled_weights: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load the teacher and place it on this process's device, or shard its blocks over the processes.

    Args:
        teacher_model, init_kwargs, default_dtype, trust_remote_code, allow_pickled_weights: see [`load_teacher`].
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        shard (`bool`, *optional*, defaults to `False`): whether to shard the blocks if there are several processes.
            The processes of a machine then load the teacher one after another.
        device (`torch.device`, *optional*): device of the teacher, if it is another one than the process's.
    """
    if device is not None and isinstance(teacher_model, str) and quantization_settings(init_kwargs):
        init_kwargs = {"device_map": {"": device}, **(init_kwargs or {})}  # it cannot be moved once it is loaded
    arguments = teacher_model, init_kwargs, default_dtype, trust_remote_code, allow_pickled_weights
    with whole_weights(accelerator.state.deepspeed_plugin):
        if not shard or accelerator.num_processes == 1:
            return place_teacher(load_teacher(*arguments), device or accelerator.device)
        with one_process_at_a_time(accelerator):
            teacher = shard_blocks(load_teacher(*arguments), accelerator.device.type)
        return teacher


def place_teacher(teacher: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move the teacher to `device`, unless it is split over devices, sharded, or quantised, hence already placed.

    Raises:
        ValueError: if its weights are sharded by ZeRO-3.
    """
    if any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
        raise UserError(
            "The weights of teacher_model are sharded over processes by ZeRO-3, since it was loaded after a "
            "configuration with ZeRO-3 was created. Pass its name or folder instead; shard_teacher=True shards it."
        )
    keep_4bit_layout(teacher)
    if is_split(teacher) or is_sharded(teacher) or getattr(teacher, "is_quantized", False):
        return teacher
    movable: torch.nn.Module = teacher  # transformers' own annotation of `to` hides its arguments
    movable.to(device)
    use_onednn_products(teacher)
    return teacher


def is_split(model: PreTrainedModel) -> bool:
    """Return whether a `device_map` has placed the model on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def shard_blocks(teacher: PreTrainedModel, device_type: str) -> PreTrainedModel:
    """Shard the teacher's transformer blocks over all processes; each block is gathered while it runs.

    Embeddings and LM head stay complete on each process, since the student's update needs the head.

    Raises:
        ValueError: for a teacher that is quantised, is split by a `device_map`, or does not name its blocks.
    """
    if is_sharded(teacher):
        return teacher
    names = set(teacher._no_split_modules or ())
    blocks = [module for module in teacher.modules() if type(module).__name__ in names]
    quantised = any(not parameter.is_floating_point() for parameter in teacher.parameters())
    if quantised or is_split(teacher) or not blocks:
        what = "is quantised" if quantised else "is split by its device_map" if blocks else "does not name its blocks"
        raise UserError(
            f"shard_teacher=True cannot shard this teacher over the processes: it {what}. Set shard_teacher=False."
        )
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for block in blocks:
        # Without a common root, each block is a root, and roots keep their gathered weights by default
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    device = torch.device(device_type, torch.accelerator.current_device_index()) if device_type != "cpu" else "cpu"
    for tensor in [*teacher.parameters(), *teacher.buffers()]:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    return teacher


def shared_vocab_size(student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of leading vocabulary rows that both models have; models of one family differ in padding.

    Raises:
        ValueError: if the tokenizer has more tokens than one of the heads has rows.
    """
    heads: dict[str, Any] = {
        "student": student.get_output_embeddings(),
        "teacher": teacher.get_output_embeddings(),
    }
    rows = {name: head.weight.shape[0] for name, head in heads.items()}
    for name, size in rows.items():
        if size < len(tokenizer):
            raise UserError(
                f"The tokenizer has {len(tokenizer)} tokens but the {name}'s LM head has {size} rows. Use the "
                f"tokenizer that the {name} was trained with, or resize its embeddings."
            )
    return min(rows.values())


def check_same_tokenizer(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    conversational: bool = False,
) -> None:
    """Check that both tokenizers give every text the same ids.

    Args:
        student_tokenizer, teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the two tokenizers.
        conversational (`bool`): whether prompts are conversations, so that the chat templates must be equal too.

    Raises:
        ValueError: naming the first difference. Token-level distillation compares distributions over one vocabulary.
    """
    advice = (
        "MiniLLM compares next-token distributions, so student and teacher must share one tokenizer. Choose models of "
        "one family, make a student out of the teacher (`minillm-trl shrink`), or distil through text with SeqKD. "
        "`minillm-trl minillm` with cross_tokenizer=True compares spans of text instead (docs/family.md)."
    )
    student_vocab, teacher_vocab = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student_vocab != teacher_vocab:
        differing = dict(student_vocab.items() ^ teacher_vocab.items())
        token = min(differing, key=lambda token: (differing[token], token))
        raise UserError(
            f"Student and teacher have different tokenizers ({len(student_vocab)} and {len(teacher_vocab)} tokens): "
            f"the first difference is the token {token!r}, id {student_vocab.get(token)} for the student and "
            f"{teacher_vocab.get(token)} for the teacher. {advice}"
        )
    # `encode_texts` drops an appended EOS, which training switches off anyway
    (student_ids,), (teacher_ids,) = (
        encode_texts(tokenizer, [PROBE_TEXT]) for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    if student_ids != teacher_ids:
        pairs = enumerate(zip(student_ids, teacher_ids, strict=False))
        position = next((i for i, (a, b) in pairs if a != b), min(len(student_ids), len(teacher_ids)))
        raise UserError(
            f"Student and teacher tokenizers share a vocabulary but encode the same text differently, starting at "
            f"token {position}: {student_ids[position : position + 5]} and {teacher_ids[position : position + 5]}. "
            f"{advice}"
        )
    if conversational and student_tokenizer.chat_template != teacher_tokenizer.chat_template:
        raise UserError(
            "Student and teacher have different chat templates, so a conversation would reach the teacher in a format "
            "that the teacher was not trained on. Save the teacher's template with the student: "
            "student_tokenizer.chat_template = teacher_tokenizer.chat_template."
        )


def has_tokenizer(name: str) -> bool:
    """Return whether a tokenizer was saved with the model or adapter `name`."""
    flags = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{flag}": False for flag in flags}
    return cached_file(name, "tokenizer_config.json", **quiet) is not None


def tokenizer_source(name: str) -> str:
    """Return the folder or hub name of a model's tokenizer; for an adapter without a tokenizer, its base's."""
    if find_adapter_config_file(name) is None or has_tokenizer(name):
        return name
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name).base_model_name_or_path or name


@torch.no_grad()
def teacher_hidden_states(
    teacher: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    batch_size: int,
) -> torch.Tensor:
    """Run the teacher once over rollouts, in batches of `batch_size` rows of similar length.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): the frozen teacher, not wrapped.
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P+T)`): left-padded prompts, right-padded completions.
        completion_length (`int`): T.
        batch_size (`int`): rows per forward pass.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`: the hidden states that predict the completions' tokens.
    """
    states: Any = None  # allocated by the first batch, which shows width and dtype
    for rows, columns in parts_by_length(attention_mask, batch_size):
        length = completion_length - (input_ids.shape[1] - columns.stop)
        part = completion_hidden_states(teacher, input_ids[rows, columns], attention_mask[rows, columns], length)
        if states is None:
            states = part.new_zeros(len(input_ids), completion_length, part.shape[-1])
        states[rows, :length] = part
    return states


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether parameters are sharded over processes, so that all processes must call the model together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


class TeacherOffload:
    """Keep the teacher on the CPU except inside a `with` statement. Its LM head stays on its device.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): the frozen teacher, on the device where it computes.

    Raises:
        ValueError: for a quantised or sharded teacher, whose tensors cannot be moved one by one.
    """

    def __init__(self, teacher: PreTrainedModel):
        head = {id(parameter) for parameter in teacher.get_output_embeddings().parameters()}
        tensors = [parameter for parameter in teacher.parameters() if id(parameter) not in head]
        if is_sharded(teacher) or not all(tensor.is_floating_point() for tensor in tensors):
            raise UserError(
                "offload_teacher=True needs a teacher whose weights are neither quantised nor sharded. Drop "
                "offload_teacher: a 4-bit or sharded teacher already takes little memory."
            )
        self.device = teacher.device
        pin = self.device.type == "cuda"
        copies = (tensor.data.to("cpu", copy=True) for tensor in tensors)
        self.home = [
            (tensor, home.pin_memory() if pin else home) for tensor, home in zip(tensors, copies, strict=True)
        ]
        self.__exit__()

    def __enter__(self) -> None:
        for tensor, home in self.home:
            tensor.data = home.to(self.device, non_blocking=True, copy=True)

    def __exit__(self, *unused: object) -> None:
        for tensor, home in self.home:
            tensor.data = home
