"""Define the configurations of the baselines. They import no trainer, so that command-line help stays fast."""

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
    r"""Configure [`FineTuningTrainer`]: the fields of [`~trl.SFTConfig`], and sampling at each evaluation.

    If no precision is set, it is chosen as in [`MiniLLMConfig`].

    Args:
        predict_with_generate (`bool`, *optional*, defaults to `False`):
            Whether each evaluation also samples a completion of every prompt and logs its Rouge-L (`eval_rouge_l`),
            length, EOS rate and repetition. `metric_for_best_model="eval_rouge_l"` then keeps the checkpoint with the
            best samples, as the paper does for its baselines; `"eval_loss"` keeps the checkpoint with the lowest
            validation loss, from which MiniLLM starts.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum length of these samples, in tokens.
        eos_tokens (`list[str]`, *optional*):
            The tokens that end a completion, as in [`MiniLLMConfig`]. Training texts end with the tokenizer's EOS if
            it is one of these tokens, otherwise with the first of them; conversations end as the chat template writes
            them. The student is saved with these tokens.
        eos_token (`str`, *optional*):
            The tokenizer's EOS, as in [`~trl.SFTConfig`], which ends training texts. Must be one of `eos_tokens`.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template, as in [`MiniLLMConfig`].
        max_nonfinite_steps (`int`, *optional*, defaults to `8`):
            Number of consecutive optimizer steps skipped for a non-finite loss or gradient at which the run ends.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`):
            Whether to load models by name that have only pickled weights (`.bin`), as some older models on the hub do.
            Pickles that hold anything but tensors are always refused.
    """

    predict_with_generate: bool = field(
        default=False,
        metadata={"help": "Sample at each evaluation and log Rouge-L, length, EOS rate and repetition."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Maximum length of these samples, in tokens."})
    eos_tokens: list[str] | None = field(default=None, metadata={"help": EOS_TOKENS_HELP})
    eos_token: str | None = field(
        default=None,
        metadata={"help": "The tokenizer's EOS, which ends training texts; for several end tokens, see eos_tokens."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template, as JSON."}
    )
    max_nonfinite_steps: int = field(
        default=8, metadata={"help": "End the run after this many consecutive steps with non-finite numbers."}
    )
    allow_pickled_weights: bool = field(
        default=False, metadata={"help": "Load models that have only pickled weights (.bin)."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's own annotation forgets ClassVar
        *SFTConfig._VALID_DICT_FIELDS,
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        choose_device(self)
        choose_precision(self)
        use_new_names(self)
        self.greater_is_better = greater_is_better(self.metric_for_best_model, self.greater_is_better)
        super().__post_init__()
        rename_dtypes(self)
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):  # FineTuningConfig itself has no teacher
            check_init_kwargs(name, getattr(self, name, None))
        self.eos_tokens = check_eos_tokens(self.eos_tokens)
        if self.eos_tokens and self.eos_token is not None and self.eos_token not in self.eos_tokens:
            raise UserError(
                f"eos_token={self.eos_token!r} is not in eos_tokens={self.eos_tokens}, the tokens that end a "
                "completion. Add it there, or leave eos_token out."
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
    r"""Configure [`KDTrainer`].

    Args:
        kd_ratio (`float`, *optional*, defaults to `0.5`):
            Weight of the forward KL to the teacher in the loss, in (0, 1]. The cross-entropy of the data has the rest.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher given by name.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Whether to shard the teacher's blocks over the processes.
    """

    kd_ratio: float = field(
        default=0.5, metadata={"help": "Weight of the forward KL to the teacher; cross-entropy has the rest."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained for the teacher."}
    )
    shard_teacher: bool = field(default=False, metadata={"help": "Shard the teacher's blocks over the processes."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's own annotation forgets ClassVar
        *FineTuningConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
    ]

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
                f"{name}={getattr(self, name)} has no effect in KD, which computes its own loss from padded rows. "
                f"Leave {name} out."
            )


@dataclass
class SeqKDConfig(FineTuningConfig):
    r"""Configure SeqKD: fine-tuning on completions that the teacher samples.

    `max_completion_length` limits the teacher's completions too.

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per training prompt.
        generation_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of the teacher.
        generation_seed (`int`, *optional*, defaults to `0`):
            Seed of the teacher's completions. Without vLLM, a completion depends on the seed, the number of the prompt
            and the number of the sample alone, not on batch size or number of processes.
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Prompts decoded together.
        keep_unfinished (`bool`, *optional*, defaults to `False`):
            Whether to train on completions cut at `max_completion_length`, as if they ended there.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to generate with vLLM, in one process. Its completions differ from those of `transformers`.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of GPUs over which vLLM splits the teacher.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained`, or of `vllm.LLM`, for the teacher.
        teacher_data_dir (`str`, *optional*):
            Folder of the teacher's completions; `<output_dir>_teacher_data` by default.
        generate_only (`bool`, *optional*, defaults to `False`):
            Whether to stop after generating the teacher's data.
    """

    num_generations: int = field(default=1, metadata={"help": "Completions per training prompt."})
    generation_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the teacher."})
    generation_seed: int = field(default=0, metadata={"help": "Seed of the teacher's completions."})
    generation_batch_size: int = field(default=32, metadata={"help": "Prompts decoded together."})
    keep_unfinished: bool = field(
        default=False, metadata={"help": "Train on completions cut at max_completion_length too."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM, in one process."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs over which vLLM splits the teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, or of vllm.LLM, for the teacher."}
    )
    teacher_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the teacher's completions; <output_dir>_teacher_data by default."}
    )
    generate_only: bool = field(default=False, metadata={"help": "Stop after generating the teacher's data."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's own annotation forgets ClassVar
        *FineTuningConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
    ]

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
        assert self.output_dir is not None  # set by TrainingArguments
        self.teacher_data_dir = self.teacher_data_dir or default_teacher_data_dir(self.output_dir)
