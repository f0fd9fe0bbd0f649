"""Define the configuration of [`MiniLLMTrainer`]: the method's own fields, and which of GRPO's are refused."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from .errors import UserError
from .hardware.precision import choose_precision
from .hardware.processes import choose_device
from .models.activation_checkpointing import use_new_names
from .models.end_tokens import EOS_TOKENS_HELP, check_eos_tokens
from .models.init_kwargs import parsed_kwargs, rename_dtypes
from .models.weight_formats import check_init_kwargs, quantization_settings, refuse_8bit_teacher
from .objectives import REWARD_ESTIMATORS, WEIGHTING_LEVELS
from .training.metric_directions import greater_is_better

# Settings that make sampling differ from softmax(logits / temperature), with the values that switch them off.
_RESHAPING_FIELDS: dict[str, tuple] = {
    "top_p": (1.0,),
    "top_k": (0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
    "cache_implementation": (None,),
}

# Inherited fields that MiniLLM replaces, or that would bias it: refused unless at their default.
_REFUSED_FIELDS: dict[str, str] = {
    "loss_type": "MiniLLM has a loss of its own; choose how it is reduced with `loss_reduction`",
    "sapo_temperature_neg": "it belongs to `loss_type='sapo'`",
    "sapo_temperature_pos": "it belongs to `loss_type='sapo'`",
    "vespo_k_pos": "it belongs to `loss_type='vespo'`",
    "vespo_lambda_pos": "it belongs to `loss_type='vespo'`",
    "vespo_k_neg": "it belongs to `loss_type='vespo'`",
    "vespo_lambda_neg": "it belongs to `loss_type='vespo'`",
    "importance_sampling_level": (
        "GRPO's sequence level is a geometric mean, which is no importance weight; choose with `importance_weighting`"
    ),
    "top_entropy_quantile": "selecting tokens by entropy would bias the reverse KL",
    "entropy_coef": "reverse KL contains the student's entropy with weight 1 already",
    "use_adaptive_entropy": "reverse KL contains the student's entropy with weight 1 already",
    "entropy_coef_min": "there is no entropy bonus",
    "entropy_coef_max": "there is no entropy bonus",
    "entropy_coef_delta": "there is no entropy bonus",
    "entropy_target": "there is no entropy bonus",
    "off_policy_mask_threshold": "the ratio to the behavior policy and its clipping take this role",
    "mask_truncated_completions": "a completion cut at the limit is a full sample of the problem with that horizon",
    "cast_lm_head_to_fp32": "the LM head's logits are reduced in float32 already",
    "use_liger_kernel": "its kernels need Triton and would bypass the scoring forward",
    "use_transformers_continuous_batching": "it permanently casts the trained weights to half precision",
    "use_transformers_paged": "it permanently casts the trained weights to half precision",
    "transformers_continuous_batching_config": "continuous batching is refused",
    "router_aux_loss_coef": "the load-balancing loss of mixture-of-experts models is not part of this trainer's loss",
    "pad_to_multiple_of": "the decode loop pads to the longest row",
    "ds3_gather_for_generation": "under ZeRO-3 rollouts are sampled from a whole copy of the student",
    "log_multimodal": "there are no images",
    "neftune_noise_alpha": "noise in the embeddings would train another distribution than the one that sampled",
    "label_smoothing_factor": "there are no labels; L_PT is a plain cross-entropy",
    "torch_compile": "the scoring forward has not been tested under it",
    "train_sampling_strategy": "prompts are ordered by `shuffle_dataset` and `seed`",
    "length_column_name": "prompts are ordered by `shuffle_dataset` and `seed`",
    "data_seed": "prompts are ordered by `shuffle_dataset` and `seed`",
    "include_num_input_tokens_seen": "`num_tokens` is logged",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint anyway",
}

_POSITIVE_FIELDS = (
    "temperature",
    "epsilon",
    "epsilon_high",
    "kd_temperature",
    "sampling_batch_size",
    "max_completion_length",
    "importance_weight_cap",
    "reward_scale",
    "reward_clip",
    "lm_coef",
    "lm_batch_size",
    "lm_max_length",
    "max_nonfinite_steps",
)

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "loss_reduction": ("token_mean", "sequence_sum"),
    "importance_weighting": WEIGHTING_LEVELS,
    "reward_estimator": REWARD_ESTIMATORS,
    "advantage_baseline": ("none", "position", "group"),
    "whiten_advantages": ("none", "tokens", "padding"),
    "teacher_hidden_states": ("device", "cpu", "recompute"),
    "compile_rollouts": (None, "inductor", "cudagraphs"),
}


class _OneGeneration(int):
    """The number 1 that GRPOConfig accepts: its lower limit of 2 is for group baselines, which MiniLLM does not
    use."""

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else int(self) < other


@dataclass
class MiniLLMConfig(GRPOConfig):
    r"""Configure [`MiniLLMTrainer`].

    Lists only the fields that MiniLLM adds or changes; the others are as in [`~trl.GRPOConfig`]. Settings of GRPO that
    have no effect here are refused with a reason.

    Args:
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher that is given as a name or folder.
        teacher_mixed_alpha (`float`, *optional*, defaults to `0.2`):
            Share of the teacher in the behavior policy (the paper's alpha, section 2.2). `0.0` samples from the
            student alone. Anything that reshapes the sampling distribution is refused with a positive value.
            Evaluation always samples from the student alone.
        importance_weighting (`str`, *optional*, defaults to `"token"`):
            How samples of the mixture stand for samples of the student, see [`objectives.importance_weights`].
            `"token"`: the paper's, the clipped ratio to the behavior policy is the weight of its token.
            `"decoupled"`: the drift since sampling is clipped, and multiplied by the token's weight.
            `"prefix"`: by the product of the weights up to the token.
            `"sequence"`: by the product over the completion, which makes the expected gradient exact.
        importance_weight_cap (`float`, *optional*):
            Upper bound of the weights of all but `"token"`, whose ratio is clipped.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of future rewards. TRL's former trainer had 0.0, which left only the current token's reward.
        length_normalization (`bool`, *optional*, defaults to `True`):
            Whether a return is the mean of the future rewards (Eq. 6) and not their sum.
        discounted_length (`bool`, *optional*, defaults to `True`):
            Whether the length that a return is divided by is discounted like the return. The authors' code: `False`.
        rkl_advantage (`bool`, *optional*, defaults to `True`):
            Whether the long term is part of the loss: the return of teacher rewards as advantage.
        single_step_decomposition (`bool`, *optional*, defaults to `True`):
            Whether the exact reverse KL of each next-token distribution is part of the loss (Eq. 3).
        include_current_reward (`bool`, *optional*):
            Whether a return includes the current token's reward. By default only without
            `single_step_decomposition`, which accounts for it exactly. The authors' code: `True`, so counted twice.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            Divisor of the teacher's rewards. The authors' scripts: 0.5.
        reward_clip (`float`, *optional*):
            Largest size of a scaled reward. The authors' scripts: 100.
        reward_estimator (`str`, *optional*, defaults to `"sampled"`):
            What a return sums up over the tokens after its own. `"sampled"`: the rewards of the tokens that were
            sampled (the paper's). `"expected"`: their expectation over the student's next token given the tokens
            before it, -KL(q || p) of that token, see [`objectives.expected_rewards`]. Without length normalisation the
            expected gradient on policy and under `importance_weighting="sequence"` stays the same, at less variance;
            under other weightings part of the bias of mixing goes.
        advantage_baseline (`str`, *optional*, defaults to `"none"`):
            What is subtracted from the return of a token, see [`objectives.leave_one_out_baseline`]. `"none"`: nothing
            (the paper's). `"position"`: the mean return of the other completions of the rollout buffer, of all
            processes, that are still going at the token's position. `"group"`: the same among the completions of the
            token's prompt, of which there must be two or more (`num_generations`). Evaluation has no baseline. Rows
            that share the coins of teacher-mixed sampling are dependent, which biases the gradient a little (0.5 % on
            an enumerated example); `importance_weighting="sequence"` therefore needs `shared_coins=False`.
        whiten_advantages (`str` or `bool`, *optional*, defaults to `"none"`):
            Whether the teacher's returns are shifted and scaled to mean 0 and variance 1 over the rollout buffer of
            all processes: `"none"`; `"tokens"` (or `True`), over the completions' tokens; `"padding"`, over
            `max_completion_length` slots a completion with zeros in those that are empty, as in the authors' code.
            Whitening makes the size of the long term independent of how far student and teacher are apart, so it
            never fades relative to the single step.
        kd_temperature (`float`, *optional*):
            Temperature of the rewards and of the single-step term; the sampling temperature if not given. The ratio to
            the behavior policy is always at the sampling temperature.
        loss_reduction (`str`, *optional*, defaults to `"token_mean"`):
            `"token_mean"`: mean over the completion tokens of an optimizer step (all processes and accumulation
            steps).
            `"sequence_sum"`: sum over tokens, mean over completions.
        eos_tokens (`list[str]`, *optional*):
            The tokens that end a completion, such as `["<|im_end|>"]`. By default all of these: the tokenizer's EOS,
            those of the generation configs of student and teacher and, where prompts are conversations, what the chat
            template writes after an assistant's turn. The student is saved with them.
        sampling_batch_size (`int`, *optional*):
            Rows that are decoded together on a process; all rows of a rollout by default.
        shared_coins (`bool`, *optional*, defaults to `True`):
            Whether rows that are decoded together share the coins of teacher-mixed sampling, so that only one of the
            models runs at a step. Each row follows the mixture either way; `False` makes the rows independent of each
            other, and of the number of processes, and runs both models at most steps.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        half_precision_rollouts (`bool`, *optional*):
            Whether rollouts are sampled from a copy of the student in the half precision that `fp16` or `bf16` names,
            brought up to date before each rollout. By default on CUDA devices under mixed precision, where
            every decoding step would otherwise cast the float32 weights again. The ratio to the behavior policy uses
            the log-probs of this copy.
        compile_rollouts (`str`, *optional*):
            Backend of `torch.compile` for the student's decoding steps, over a static KV cache: `"inductor"`, or
            `"cudagraphs"` where there is no Triton (V100). Each shape (rows, length rounded up to a power of two, one
            to four tokens) is compiled once; sliding windows mostly run uncompiled. Not compiled by default.
        teacher_hidden_states (`str`, *optional*, defaults to `"device"`):
            Where the teacher's hidden states of a rollout are kept for the inner passes: `"device"`; `"cpu"`, from
            where each batch is copied; or nowhere: `"recompute"` runs the teacher in every inner pass.
        offload_teacher (`bool`, *optional*, defaults to `False`):
            Whether the teacher is on the CPU, all but its LM head, while the student is updated.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Whether the teacher's transformer blocks are spread over the processes (`fully_shard`), each gathered while
            it runs. Works with a student under DDP as well as under ZeRO or FSDP.
        teacher_shares_base (`bool`, *optional*, defaults to `False`):
            Whether `teacher_model` names an adapter on the base of the student, which is an adapter too. The base's
            weights, quantised or not, are then there once.
        lm_coef (`float`, *optional*, defaults to `1.0`):
            Weight of L_PT, the language-modelling loss on `lm_dataset` (Algorithm 1). It is divided by its own number
            of tokens in the optimizer step.
        lm_kd_ratio (`float`, *optional*, defaults to `0.0`):
            Share of forward KL to the teacher in L_PT, the rest being cross-entropy. The authors' code: 0.5.
        lm_batch_size (`int`, *optional*):
            Sequences of `lm_dataset` in each micro-batch; `per_device_train_batch_size` by default.
        lm_max_length (`int`, *optional*, defaults to `512`):
            Tokens of one of its sequences.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of a KL to the student as it was, per token as in GRPO (`use_bias_correction_kl` included).
        epsilon_high, delta (`float`, *optional*):
            As in GRPO: another upper half of the clip range, and a bound of the ratio at negative advantages.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether the student's dropout is off in training. The teacher's always is.
        max_nonfinite_steps (`int`, *optional*, defaults to `8`):
            Optimizer steps in a row that may be skipped because a loss, a gradient or every completion's score is not
            finite; at that number the run ends. Single completions whose score is not finite are left out.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`):
            Whether models that are given by name may have their weights as pickles (`.bin`) alone, as older ones on
            the hub do. Pickles of more than tensors are refused in any case.
        bf16 (`bool`, *optional*):
            Mixed precision in bfloat16. Unless `fp16` or this is set, the precision is what `accelerate launch` was
            told, or else bfloat16 on CUDA devices that have it (compute capability 8.0 and above). TRL's default is
            `True` everywhere.
    """

    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher, as JSON."}
    )
    teacher_mixed_alpha: float = field(
        default=0.2, metadata={"help": "Share of the teacher in the policy that samples rollouts, in [0, 1]."}
    )
    importance_weighting: str = field(
        default="token",
        metadata={
            "help": "Importance weights of samples of the mixture: per token (clipped), decoupled from the drift, or "
            "products over the prefix or the sequence.",
            "choices": list(WEIGHTING_LEVELS),
        },
    )
    importance_weight_cap: float | None = field(
        default=None, metadata={"help": "Upper bound of decoupled, prefix and sequence weights."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of future rewards, in [0, 1]."})
    length_normalization: bool = field(
        default=True, metadata={"help": "Use the mean of the future rewards as return, not their sum."}
    )
    discounted_length: bool = field(
        default=True, metadata={"help": "Discount the length that returns are divided by, like the returns."}
    )
    rkl_advantage: bool = field(
        default=True, metadata={"help": "Include the long term: returns of teacher rewards as advantages."}
    )
    single_step_decomposition: bool = field(
        default=True, metadata={"help": "Include the exact reverse KL of every next-token distribution."}
    )
    include_current_reward: bool | None = field(
        default=None,
        metadata={
            "help": "Include the current token's reward in its return; by default without the single step only."
        },
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Divisor of the teacher's rewards."})
    reward_clip: float | None = field(default=None, metadata={"help": "Largest size of a scaled reward."})
    reward_estimator: str = field(
        default="sampled",
        metadata={
            "help": "Future rewards of a return: those of the sampled tokens, or expected given the tokens before.",
            "choices": list(REWARD_ESTIMATORS),
        },
    )
    advantage_baseline: str = field(
        default="none",
        metadata={
            "help": "Baseline of the teacher's returns: none, or leave-one-out by position over the rollout buffer or "
            "over the completions of the prompt.",
            "choices": ["none", "position", "group"],
        },
    )
    whiten_advantages: str = field(
        default="none",
        metadata={
            "help": "Whiten the teacher's returns over the tokens of the rollout buffer, or over its padded slots."
        },
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
    eos_tokens: list[str] | None = field(default=None, metadata={"help": EOS_TOKENS_HELP})
    sampling_batch_size: int | None = field(
        default=None, metadata={"help": "Rows decoded together on a process; all rows of a rollout if not given."}
    )
    shared_coins: bool = field(
        default=True,
        metadata={
            "help": "Share the coins of teacher-mixed sampling among them: fewer forward passes, dependent rows."
        },
    )
    half_precision_rollouts: bool | None = field(
        default=None,
        metadata={"help": "Sample from a half-precision copy of the student; by default on GPUs in fp16 or bf16."},
    )
    compile_rollouts: str | None = field(
        default=None,
        metadata={
            "help": "Compile the student's decoding steps, over a static KV cache, by this backend of torch.compile.",
            "choices": ["inductor", "cudagraphs"],
        },
    )
    teacher_hidden_states: str = field(
        default="device",
        metadata={
            "help": "Where the teacher's hidden states are kept for the inner passes.",
            "choices": ["device", "cpu", "recompute"],
        },
    )
    offload_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher on the CPU while the student is updated."}
    )
    shard_teacher: bool = field(
        default=False, metadata={"help": "Spread the teacher's transformer blocks over the processes."}
    )
    teacher_shares_base: bool = field(
        default=False, metadata={"help": "The teacher is an adapter on the base of the student, which is there once."}
    )
    lm_coef: float = field(default=1.0, metadata={"help": "Weight of the language-modelling loss on lm_dataset."})
    lm_kd_ratio: float = field(
        default=0.0, metadata={"help": "Share of forward KL to the teacher in that loss, in [0, 1]."}
    )
    lm_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences of lm_dataset a micro-batch; per_device_train_batch_size if not given."},
    )
    lm_max_length: int = field(default=512, metadata={"help": "Tokens of a sequence of lm_dataset."})
    num_generations: int = field(default=1, metadata={"help": "Completions sampled per prompt."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch the student's dropout off in training."})

    max_nonfinite_steps: int = field(
        default=8, metadata={"help": "End the run when so many steps in a row were skipped for numbers not finite."}
    )
    allow_pickled_weights: bool = field(
        default=False, metadata={"help": "Load models that have their weights as pickles (.bin) alone."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's own annotation forgets ClassVar
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        choose_device(self)
        choose_precision(self)
        use_new_names(self)
        self.greater_is_better = greater_is_better(self.metric_for_best_model, self.greater_is_better)
        single = self.num_generations == 1
        if single:
            self.num_generations = _OneGeneration(1)
        super().__post_init__()
        rename_dtypes(self)
        if single:
            self.num_generations = 1
        self.eos_tokens = check_eos_tokens(self.eos_tokens)
        if isinstance(self.whiten_advantages, bool):
            self.whiten_advantages = "tokens" if self.whiten_advantages else "none"
        if self.half_precision_rollouts is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available()
            self.half_precision_rollouts = on_gpu and (self.fp16 or self.bf16)
        if self.include_current_reward is None:
            self.include_current_reward = not self.single_step_decomposition
        self._check_values()
        self._check_weights()
        self._check_memory()
        self._check_sampling()
        self._check_inherited()
        assert self.steps_per_generation is not None  # set by GRPOConfig
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: an optimizer step is normalised by the tokens of one rollout "
                "buffer. Raise steps_per_generation (or generation_batch_size), or lower gradient_accumulation_steps."
            )

    def _check_values(self) -> None:
        if self.max_completion_length is None:
            raise UserError("max_completion_length must be set: it is the horizon of the objective.")
        for name in ("teacher_mixed_alpha", "gamma", "lm_kd_ratio"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UserError(f"{name} must lie in [0, 1], got {value}.")
        for name in _POSITIVE_FIELDS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, got {value}.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} must be one of {choices}, got {value!r}.")
        if self.beta < 0:
            raise UserError(f"beta must not be negative, got {self.beta}.")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and not self.delta > 1 + high:
            raise UserError(f"delta must be above the clip range, which ends at {1 + high}, got {self.delta}.")
        self._check_long_term()
        if self.importance_weight_cap is not None and self.importance_weighting == "token":
            raise UserError(
                f"importance_weight_cap={self.importance_weight_cap} has no effect on importance_weighting='token', "
                "whose ratio is clipped: set epsilon, or delta for negative advantages, or another weighting."
            )

    def _check_weights(self) -> None:
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            check_init_kwargs(name, getattr(self, name))
        quantization = quantization_settings(parsed_kwargs(self.teacher_model_init_kwargs))
        refuse_8bit_teacher(quantization.get("load_in_8bit", False), self.teacher_mixed_alpha)

    def _check_long_term(self) -> None:
        for name, neutral in (("reward_estimator", "sampled"), ("advantage_baseline", "none")):
            value = getattr(self, name)
            if not self.rkl_advantage and value != neutral:
                raise UserError(
                    f"{name}={value!r} has no effect with rkl_advantage=False, which leaves the returns of the "
                    f"teacher's rewards out. Drop {name}, or set rkl_advantage=True."
                )
        if self.advantage_baseline == "group" and self.num_generations == 1:
            raise UserError(
                "advantage_baseline='group' is a mean over the other completions of a prompt, but num_generations=1: "
                "set num_generations to 2 or more, or advantage_baseline='position'."
            )
        mixed = self.teacher_mixed_alpha > 0.0 and self.shared_coins
        if self.advantage_baseline != "none" and self.importance_weighting == "sequence" and mixed:
            raise UserError(
                f"advantage_baseline={self.advantage_baseline!r} is made of rows that share their coins with the row "
                "it is for (shared_coins=True), which biases the gradient that importance_weighting='sequence' is to "
                "make exact. Set shared_coins=False."
            )

    def _check_memory(self) -> None:
        if self.half_precision_rollouts and not (self.fp16 or self.bf16):
            raise UserError(
                "half_precision_rollouts=True takes its precision from mixed precision: set fp16=True or bf16=True, "
                "or half_precision_rollouts=False."
            )
        for name in ("offload_teacher", "shard_teacher"):
            if self.teacher_shares_base and getattr(self, name):
                raise UserError(
                    f"{name}=True and teacher_shares_base=True: the teacher's weights are the student's, so they stay "
                    "where they are. Drop one of them."
                )
        if self.teacher_shares_base and self.teacher_model_init_kwargs:
            raise UserError(
                f"teacher_model_init_kwargs={self.teacher_model_init_kwargs} has no effect with "
                "teacher_shares_base=True, as only an adapter is loaded. Drop one of them."
            )
        if self.offload_teacher and self.shard_teacher:
            raise UserError(
                "offload_teacher=True and shard_teacher=True: tensors that are spread over processes cannot be moved "
                "one by one. Drop offload_teacher: a sharded teacher takes little memory as it is."
            )
        for name, value in (("teacher_hidden_states", "recompute"), ("lm_kd_ratio", self.lm_kd_ratio or None)):
            if self.offload_teacher and getattr(self, name) == value:
                raise UserError(
                    "offload_teacher=True keeps the teacher on the CPU in the inner passes, in which "
                    f"{name}={value!r} needs it. Drop one of them."
                )

    def _check_sampling(self) -> None:
        if self.teacher_mixed_alpha == 0.0:
            return
        if self.use_vllm:
            raise UserError(
                "use_vllm=True cannot sample from the teacher-student mixture: set teacher_mixed_alpha=0.0 to use "
                "vLLM, or use_vllm=False to keep teacher-mixed sampling."
            )
        for name in self.reshaping_fields():
            raise UserError(
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
                raise UserError(
                    f"{name}={value!r} is not supported by MiniLLM: {reason}. Leave it at {defaults[name]!r}."
                )

        if getattr(self.accelerator_config, "split_batches", False):  # parsed by TrainingArguments
            raise UserError(
                "accelerator_config.split_batches=True would split a rollout's prompts a second time over the "
                "processes. Leave it at False."
            )

    def reshaping_fields(self) -> list[str]:
        """Return the names of the set fields that make sampling differ from softmax(logits / temperature)."""
        return [name for name, neutral in _RESHAPING_FIELDS.items() if getattr(self, name) not in neutral]
