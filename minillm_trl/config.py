"""Configuration of [`MiniLLMTrainer`]: the method's own fields, and a verdict on the inherited ones."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

# Settings under which tokens are not drawn from softmax(logits / temperature), with the value that switches each off.
_RESHAPING_FIELDS: dict[str, tuple] = {
    "top_p": (1.0,),
    "top_k": (0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
    "cache_implementation": (None,),
}

# Fields of GRPOConfig that act on parts of GRPO's loss or generation that MiniLLM replaces: refused unless at their
# default.
_REFUSED_FIELDS: dict[str, str] = {
    "loss_type": "MiniLLM has a loss of its own; choose how it is reduced with `loss_reduction`",
    "delta": "two-sided clipping belongs to GRPO's loss",
    "epsilon_high": "the clip range of MiniLLM is symmetric; set `epsilon`",
    "importance_sampling_level": "importance weights are per token here (GRPO's sequence level is a geometric mean)",
    "beta": "a KL term to a reference model is not part of this trainer's loss",
    "sync_ref_model": "there is no reference model",
    "top_entropy_quantile": "selecting tokens by entropy would bias the reverse KL",
    "entropy_coef": "reverse KL contains the student's entropy with weight 1 already",
    "use_adaptive_entropy": "reverse KL contains the student's entropy with weight 1 already",
    "off_policy_mask_threshold": "the ratio to the behavior policy and its clipping take this role",
    "mask_truncated_completions": "a completion cut at the limit is a full sample of the problem with that horizon",
    "cast_lm_head_to_fp32": "the LM head's logits are reduced in float32 already",
    "use_liger_kernel": "its kernels need Triton and would bypass the scoring forward",
    "use_transformers_continuous_batching": "it casts the trained weights to half precision for good",
    "use_transformers_paged": "it casts the trained weights to half precision for good",
    "router_aux_loss_coef": "the load-balancing loss of mixture-of-experts models is not part of this trainer's loss",
    "pad_to_multiple_of": "the decode loop pads to the longest row",
}


class _OneGeneration(int):
    """The number 1 that GRPOConfig accepts: its lower limit of 2 is for group baselines, which MiniLLM does not
    use."""

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else int(self) < other


@dataclass
class MiniLLMConfig(GRPOConfig):
    r"""Configuration of [`MiniLLMTrainer`].

    Only what MiniLLM adds or changes is listed; the rest is [`~trl.GRPOConfig`]'s. Settings of GRPO that have no
    meaning here are refused with a reason, never ignored.

    Args:
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher that is given as a name or folder.
        teacher_mixed_alpha (`float`, *optional*, defaults to `0.2`):
            Share of the teacher in the behavior policy (the paper's alpha, section 2.2). `0.0` samples from the
            student alone. Anything that reshapes the sampling distribution is refused with a positive value.
            Evaluation always samples from the student alone.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of future rewards. TRL's former trainer had 0.0, which left only the current token's reward.
        length_normalization (`bool`, *optional*, defaults to `True`):
            Whether a return is the mean of the future rewards (Eq. 6) and not their sum.
        rkl_advantage (`bool`, *optional*, defaults to `True`):
            Whether the long term is part of the loss: the return of teacher rewards as advantage.
        single_step_decomposition (`bool`, *optional*, defaults to `True`):
            Whether the exact reverse KL of each next-token distribution is part of the loss (Eq. 3). If not, the
            return includes the current token's reward.
        kd_temperature (`float`, *optional*):
            Temperature of the rewards and of the single-step term; the sampling temperature if not given. The ratio to
            the behavior policy is always at the sampling temperature.
        loss_reduction (`str`, *optional*, defaults to `"token_mean"`):
            `"token_mean"`: mean over the completion tokens of an optimizer step (all processes and accumulation
            steps).
            `"sequence_sum"`: sum over tokens, mean over completions.
        sampling_batch_size (`int`, *optional*):
            Rows that are decoded together on a process; they share the coins of teacher-mixed sampling. All rows of a
            rollout by default.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether the student's dropout is off in training. The teacher's always is.
        bf16 (`bool`, *optional*):
            Mixed precision in bfloat16. By default on CUDA devices that have it (compute capability 8.0 and above)
            unless `fp16` is set. TRL's default is `True` everywhere.
    """

    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher, as JSON."}
    )
    teacher_mixed_alpha: float = field(
        default=0.2, metadata={"help": "Share of the teacher in the policy that samples rollouts, in [0, 1]."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of future rewards, in [0, 1]."})
    length_normalization: bool = field(
        default=True, metadata={"help": "Use the mean of the future rewards as return, not their sum."}
    )
    rkl_advantage: bool = field(
        default=True, metadata={"help": "Include the long term: returns of teacher rewards as advantages."}
    )
    single_step_decomposition: bool = field(
        default=True, metadata={"help": "Include the exact reverse KL of every next-token distribution."}
    )
    kd_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of rewards and single-step term; the sampling temperature if not given."},
    )
    loss_reduction: str = field(
        default="token_mean",
        metadata={
            "help": "`token_mean` over the optimizer step, or `sequence_sum` (mean over completions).",
            "choices": ["token_mean", "sequence_sum"],
        },
    )
    sampling_batch_size: int | None = field(
        default=None, metadata={"help": "Rows decoded together on a process; all rows of a rollout if not given."}
    )
    num_generations: int = field(default=1, metadata={"help": "Completions sampled per prompt."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch the student's dropout off in training."})

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        single = self.num_generations == 1
        if single:
            self.num_generations = _OneGeneration(1)
        super().__post_init__()
        if single:
            self.num_generations = 1
        self._check_values()
        self._check_sampling()
        self._check_inherited()
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: an optimizer step is normalised by the tokens of one rollout "
                "buffer. Raise steps_per_generation (or generation_batch_size), or lower gradient_accumulation_steps."
            )

    def _check_values(self) -> None:
        for name in ("teacher_mixed_alpha", "gamma"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}.")
        for name in ("temperature", "epsilon", "kd_temperature", "sampling_batch_size", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.max_completion_length is None:
            raise ValueError("max_completion_length must be set: it is the horizon of the objective.")
        choices = ("token_mean", "sequence_sum")
        if self.loss_reduction not in choices:
            raise ValueError(f"loss_reduction must be one of {choices}, got {self.loss_reduction!r}.")

    def _check_sampling(self) -> None:
        if self.teacher_mixed_alpha == 0.0:
            return
        if self.use_vllm:
            raise ValueError(
                "use_vllm=True cannot sample from the teacher-student mixture: set teacher_mixed_alpha=0.0 to use "
                "vLLM, or use_vllm=False to keep teacher-mixed sampling."
            )
        for name in self.reshaping_fields():
            raise ValueError(
                f"{name}={getattr(self, name)!r} reshapes the sampling distribution, which then is not the mixture "
                f"that the importance weights assume. Drop {name}, or set teacher_mixed_alpha=0.0."
            )

    def _check_inherited(self) -> None:
        defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
        for name, reason in _REFUSED_FIELDS.items():
            value = getattr(self, name)
            if name == "pad_to_multiple_of":  # "auto" has been resolved to None by now
                defaults[name] = None
            if value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} is not supported by MiniLLM: {reason}. Leave it at {defaults[name]!r}."
                )

    def reshaping_fields(self) -> list[str]:
        """Names of the fields whose value makes sampling differ from softmax(logits / temperature)."""
        return [name for name, neutral in _RESHAPING_FIELDS.items() if getattr(self, name) not in neutral]
