"""Configurations of the baselines, apart from their trainers so that a command's options need no trainer."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import SFTConfig

from ..errors import UserError
from ..hardware.precision import choose_precision
from ..hardware.processes import choose_device
from ..models.activation_checkpointing import use_new_names
from ..models.end_tokens import EOS_TOKENS_HELP, check_eos_tokens
from ..models.init_kwargs import rename_dtypes
from ..models.weight_formats import check_init_kwargs
from ..training.metric_directions import greater_is_better
from .teacher_data import default_teacher_data_dir

_SAMPLED_METRICS = ("rouge_l", "completions/mean_length", "rollout/eos_rate", "rollout/repeated_4grams")


@dataclass
class FineTuningConfig(SFTConfig):
    r"""Configuration of [`FineTuningTrainer`]: that of [`~trl.SFTTrainer`], with samples at each evaluation.

    The precision, where none is set, is chosen as for MiniLLM.

    Args:
        predict_with_generate (`bool`, *optional*, defaults to `False`):
            Whether each evaluation also samples a completion for every prompt and logs its Rouge-L
            (`eval_rouge_l`), length, end-of-sequence rate and repetition. `metric_for_best_model="eval_rouge_l"` then
            keeps the checkpoint with the best samples, as the paper does for its baselines; `"eval_loss"` the one
            with the lowest validation loss, which MiniLLM starts from.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Length limit of these samples.
        eos_tokens (`list[str]`, *optional*):
            The tokens that end a completion, as in [`MiniLLMConfig`]. Texts are learnt with the tokenizer's EOS at
            their end, which is the first of these unless it is one of them; conversations as the chat template ends
            them. The student is saved with them.
        eos_token (`str`, *optional*):
            The tokenizer's EOS, as in [`~trl.SFTConfig`]: what texts end with. It is one of `eos_tokens`.
        chat_template_kwargs (`dict`, *optional*):
            What else the chat template is given, as in [`MiniLLMConfig`].
        max_nonfinite_steps (`int`, *optional*, defaults to `8`):
            Optimizer steps in a row that may be skipped because a loss or gradient is not finite; at that number the
            run ends.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`):
            Whether models that are given by name may have their weights as pickles (`.bin`) alone, as older ones on
            the hub do. Pickles of more than tensors are refused in any case.
    """

    predict_with_generate: bool = field(
        default=False,
        metadata={"help": "Sample at each evaluation and log Rouge-L, length, end-of-sequence rate and repetition."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Length limit of these samples."})
    eos_tokens: list[str] | None = field(default=None, metadata={"help": EOS_TOKENS_HELP})
    eos_token: str | None = field(
        default=None,
        metadata={"help": "The tokenizer's EOS, which texts are learnt with; to end with several, see eos_tokens."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What else the chat template is given, as JSON."}
    )
    max_nonfinite_steps: int = field(
        default=8, metadata={"help": "End the run when so many steps in a row were skipped for numbers not finite."}
    )
    allow_pickled_weights: bool = field(
        default=False, metadata={"help": "Load models that have their weights as pickles (.bin) alone."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    def __post_init__(self) -> None:
        choose_device(self)
        choose_precision(self)
        use_new_names(self)
        self.greater_is_better = greater_is_better(self.metric_for_best_model, self.greater_is_better)
        super().__post_init__()
        rename_dtypes(self)
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):  # some have no teacher
            check_init_kwargs(name, getattr(self, name, None))
        self.eos_tokens = check_eos_tokens(self.eos_tokens)
        if self.eos_tokens and self.eos_token is not None and self.eos_token not in self.eos_tokens:
            raise UserError(
                f"eos_token={self.eos_token!r} is none of eos_tokens={self.eos_tokens}, which end a completion. Add "
                "it there, or leave it out."
            )
        for name in ("max_completion_length", "max_nonfinite_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.predict_with_generate and self.eval_strategy == "no" and not self.eval_on_start:
            raise UserError("predict_with_generate=True needs evaluations: set eval_strategy to 'steps' or 'epoch'.")
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        if metric in _SAMPLED_METRICS and not self.predict_with_generate:
            raise UserError(
                f"metric_for_best_model={self.metric_for_best_model!r} is measured on samples: set "
                "predict_with_generate=True."
            )


@dataclass
class KDConfig(FineTuningConfig):
    r"""Configuration of [`KDTrainer`].

    Args:
        kd_ratio (`float`, *optional*, defaults to `0.5`):
            Share of the forward KL to the teacher in the loss; the rest is the cross-entropy of the data.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher that is given by name.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Whether the teacher's blocks are spread over the processes.
    """

    kd_ratio: float = field(
        default=0.5, metadata={"help": "Share of the forward KL to the teacher; the rest is cross-entropy."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained for the teacher."}
    )
    shard_teacher: bool = field(default=False, metadata={"help": "Spread the teacher's blocks over the processes."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*FineTuningConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.kd_ratio <= 1.0:
            raise UserError(f"kd_ratio must lie in (0, 1], got {self.kd_ratio}. For 0 fine-tune with sft.")
        unsupported = {
            "packing": self.packing or bool(self.eval_packing),
            "padding_free": self.padding_free,
            "loss_type": self.loss_type != "nll",
            "label_smoothing_factor": self.label_smoothing_factor > 0,
            "use_liger_kernel": self.use_liger_kernel,
        }
        for name in (name for name, is_set in unsupported.items() if is_set):
            raise UserError(
                f"{name}={getattr(self, name)} has no meaning for KD, whose loss is computed token by token from "
                f"padded rows. Leave {name} out."
            )


@dataclass
class SeqKDConfig(FineTuningConfig):
    r"""Configuration of SeqKD: that of the fine-tuning, and how the teacher answers.

    `max_completion_length` limits the teacher's completions too.

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions of each training prompt.
        generation_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of the teacher.
        generation_seed (`int`, *optional*, defaults to `0`):
            With the number of a prompt and of its sample, it determines a completion, whatever the batch size and the
            number of processes (with `transformers`).
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Prompts decoded together.
        keep_unfinished (`bool`, *optional*, defaults to `False`):
            Whether completions that were cut at `max_completion_length` are learnt from, as if they ended there.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM generates, in one process; its completions are others than those of `transformers`.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs over which vLLM spreads the teacher.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`, or of `vllm.LLM`, for the teacher.
        teacher_data_dir (`str`, *optional*):
            Folder of the teacher's completions, by default `<output_dir>_teacher_data`.
        generate_only (`bool`, *optional*, defaults to `False`):
            Whether to stop when the teacher's data is there.
    """

    num_generations: int = field(default=1, metadata={"help": "Completions of each training prompt."})
    generation_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the teacher."})
    generation_seed: int = field(default=0, metadata={"help": "Seed of the teacher's completions."})
    generation_batch_size: int = field(default=32, metadata={"help": "Prompts decoded together."})
    keep_unfinished: bool = field(
        default=False, metadata={"help": "Learn from completions that were cut at max_completion_length too."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM, in one process."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs over which vLLM spreads the teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, or of vllm.LLM, for the teacher."}
    )
    teacher_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the teacher's completions; <output_dir>_teacher_data by default."}
    )
    generate_only: bool = field(default=False, metadata={"help": "Stop when the teacher's data is there."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*FineTuningConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "generation_batch_size", "vllm_tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.generation_temperature > 0:
            raise UserError(f"generation_temperature must be positive, got {self.generation_temperature}.")
        if self.generation_seed < 0:
            raise UserError(f"generation_seed must not be negative, got {self.generation_seed}.")
        if self.use_vllm and self.world_size > 1:
            raise UserError(
                f"use_vllm=True with {self.world_size} processes: each would load the whole teacher. Generate in one "
                "process with vllm_tensor_parallel_size GPUs (generate_only=True), then fine-tune in several."
            )
        if not self.use_vllm and self.vllm_tensor_parallel_size > 1:
            raise UserError("vllm_tensor_parallel_size has no effect without use_vllm=True.")
        self.teacher_data_dir = self.teacher_data_dir or default_teacher_data_dir(self.output_dir)
