"""Define the configuration of [`MiniLLMTrainer`]: the method's own fields.

`training/config_checks.py` has the checks, and the fields of GRPO that are refused.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from .family_config import FamilyConfig
from .hardware.precision import choose_precision
from .hardware.processes import choose_device
from .models.activation_checkpointing import use_new_names
from .models.end_tokens import EOS_TOKENS_HELP, check_eos_tokens
from .models.init_kwargs import rename_dtypes
from .objectives import REWARD_ESTIMATORS, WEIGHTING_LEVELS
from .rollout_config import RolloutConfig
from .training.config_checks import RESHAPING_FIELDS, check_config
from .training.metric_directions import greater_is_better


class _OneGeneration(int):
    """The number 1, but accepted by GRPOConfig, whose minimum of 2 is for group baselines.

    MiniLLM needs no group: by default, its advantages do not compare completions.
    """

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else int(self) < other


@dataclass
class MiniLLMConfig(FamilyConfig, RolloutConfig):
    r"""Configure [`MiniLLMTrainer`].

    Lists only the fields that MiniLLM adds or changes. [`~minillm_trl.rollout_config.RolloutConfig`] has those that
    say how rollouts are computed, [`~minillm_trl.family_config.FamilyConfig`] those of related methods. The others are
    as in [`~trl.GRPOConfig`]. Settings of GRPO that have no effect here are refused with a reason.

    Args:
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher given as a name or folder.
        teachers (`dict[str, str]`, *optional*):
            Several teachers in place of `teacher_model`: for each value of `teacher_column` a name, a folder, the
            address of a server, or a list of addresses.
        teacher_column (`str`, *optional*, defaults to `"teacher"`):
            Column of the prompts that chooses the teacher of a row, if there are several.
        teacher_server_url (`str` or `list[str]`, *optional*):
            Address of a server with the teacher, or of several with the same teacher, in place of `teacher_model`:
            `minillm-trl serve-teacher`, or vLLM's OpenAI-compatible server. Needs `teacher_mixed_alpha=0.0`. Rewards
            are exact. The single step and expected rewards treat all tokens but the sampled one and
            `teacher_server_top_k` listed ones as a single token, so the reverse KL is a lower bound.
        teacher_server_top_k (`int`, *optional*, defaults to `64`):
            The tokens that are listed for each token. The size of the vocabulary makes everything exact. vLLM returns
            at most `--max-logprobs` (20 by default).
        teacher_server_tokens (`str`, *optional*):
            Whose most likely tokens are listed: the `"student"`'s, as it was when the rollout was sampled, or the
            `"teacher"`'s. By default the student's, which keeps more of the gradient unless the updates on a buffer
            move the student far, and with vLLM the teacher's, as its protocol can list no others.
        teacher_server_batch_size (`int`, *optional*, defaults to `16`):
            Completions of one request.
        teacher_server_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer.
        teacher_server_retries (`int`, *optional*, defaults to `10`):
            Failures in a row after which a server is given up, with pauses of 1, 2, 4, ... up to 60 seconds: by
            default about five minutes. If no server is left, the run saves a checkpoint and stops.
        teacher_mixed_alpha (`float`, *optional*, defaults to `0.2`):
            Share of the teacher in the behavior policy (the paper's alpha, section 2.2). `0.0` samples from the
            student alone. With a positive value, settings that reshape the sampling distribution are refused.
            Evaluation always samples from the student alone.
        importance_weighting (`str`, *optional*, defaults to `"token"`):
            Weights for samples that the mixture, and not the student, has drawn, see
            [`objectives.importance_weights`]. `"token"` (the paper's): the clipped ratio to the behavior policy is the
            weight of its token. In all others, the ratio to the student that sampled is clipped, and multiplied by a
            weight. `"decoupled"`: the token's weight. `"prefix"`: the product of the weights up to the token.
            `"sequence"`: the product over the completion, which makes the expected gradient exact.
        importance_weight_cap (`float`, *optional*):
            Upper bound of the weights, except for `"token"`, whose ratio is clipped.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of future rewards. TRL's former trainer used 0.0, which keeps only the current token's reward.
        length_normalization (`bool`, *optional*, defaults to `True`):
            Whether a return is the mean of the future rewards (Eq. 6), instead of their sum.
        discounted_length (`bool`, *optional*, defaults to `True`):
            Whether the length in this mean is discounted like the rewards. The authors' code: `False`.
        rkl_advantage (`bool`, *optional*, defaults to `True`):
            Whether the loss includes the long term: the return of teacher rewards as advantage.
        single_step_decomposition (`bool`, *optional*, defaults to `True`):
            Whether the loss includes the exact reverse KL of each next-token distribution (Eq. 3), or another
            `single_step_divergence`.
        include_current_reward (`bool`, *optional*):
            Whether a return includes the current token's reward. By default only without
            `single_step_decomposition`, which accounts for it exactly. The authors' code: `True`, so it counts twice.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            Divisor of the teacher's rewards. The authors' scripts: 0.5.
        reward_clip (`float`, *optional*):
            Maximum absolute value of a scaled reward. The authors' scripts: 100. With `cross_tokenizer`, of the mean
            over the student's tokens of a span.
        reward_estimator (`str`, *optional*, defaults to `"sampled"`):
            The future rewards in a return. `"sampled"` (the paper's): the rewards of the sampled tokens. `"expected"`:
            their expectation over the student's next token given the tokens before it, -KL(q || p) of that token, see
            [`objectives.expected_rewards`]. Without length normalisation, on policy or with
            `importance_weighting="sequence"`, the expected gradient stays the same and its variance is lower. With
            other weightings, part of the bias of mixing disappears.
        advantage_baseline (`str`, *optional*, defaults to `"none"`):
            Baseline to subtract from the return of a token, see [`objectives.leave_one_out_baseline`]. `"none"` (the
            paper's): no baseline. `"position"`: the mean return of the other completions in the rollout buffer of all
            processes that reach the token's position. `"group"`: the same among the completions of the token's prompt,
            with `num_generations` of two or more. Evaluation has no baseline. Rows that share the coins of
            teacher-mixed sampling are dependent, which biases the gradient slightly (0.5 % in an enumerated example);
            `importance_weighting="sequence"` therefore requires `shared_coins=False`.
        whiten_advantages (`str` or `bool`, *optional*, defaults to `"none"`):
            Whether to shift and scale the teacher's returns to mean 0 and variance 1 over the rollout buffer of all
            processes. `"none"`: no. `"tokens"` (or `True`): over the completions' tokens. `"padding"`: over
            `max_completion_length` slots for each completion, with zeros in empty slots, as in the authors' code.
            Whitening makes the size of the long term independent of the distance between student and teacher, so it
            does not shrink relative to the single step.
        kd_temperature (`float`, *optional*):
            Temperature of the rewards and of the single-step term; by default the sampling temperature. The ratio to
            the behavior policy always uses the sampling temperature.
        loss_reduction (`str`, *optional*, defaults to `"token_mean"`):
            `"token_mean"`: mean over the completion tokens of an optimizer step (all processes and accumulation
            steps).
            `"sequence_sum"`: sum over tokens, mean over completions.
        eos_tokens (`list[str]`, *optional*):
            The tokens that end a completion, such as `["<|im_end|>"]`. By default all of these: the EOS of the
            tokenizer and of the generation configs of student and teacher and, for prompts that are conversations, the
            end of an assistant's turn in the chat template. The student is saved with them.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        teacher_hidden_states (`str`, *optional*, defaults to `"device"`):
            Where to keep the teacher's hidden states of a rollout for the inner passes. `"device"`: on the device.
            `"cpu"`: in main memory, from which each batch is copied. `"recompute"`: not at all; every inner pass runs
            the teacher.
        offload_teacher (`bool`, *optional*, defaults to `False`):
            Whether to move the teacher, except for its LM head, to the CPU during updates of the student.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Whether to shard the teacher's transformer blocks over the processes (`fully_shard`); a block is gathered
            while it runs. Works with a student under DDP as well as under ZeRO or FSDP.
        teacher_shares_base (`bool`, *optional*, defaults to `False`):
            Whether `teacher_model` names an adapter on the base of the student, which is an adapter too. Both then
            share the base's weights, quantised or not.
        lm_coef (`float`, *optional*, defaults to `1.0`):
            Weight of L_PT, the language-modelling loss on `lm_dataset` (Algorithm 1), which is a mean over the corpus
            tokens of the optimizer step.
        lm_kd_ratio (`float`, *optional*, defaults to `0.0`):
            Share of forward KL to the teacher in L_PT, the rest being cross-entropy. The authors' code: 0.5.
        lm_batch_size (`int`, *optional*):
            Sequences of `lm_dataset` in each micro-batch; `per_device_train_batch_size` by default.
        lm_max_length (`int`, *optional*, defaults to `512`):
            Maximum number of tokens in a sequence of `lm_dataset`.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of a KL to the initial student, per token as in GRPO (`use_bias_correction_kl` included).
        epsilon_high, delta (`float`, *optional*):
            As in GRPO: the upper half of the clip range, if different, and a bound of the ratio for negative
            advantages.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable the student's dropout in training. The teacher's is always disabled.
        max_nonfinite_steps (`int`, *optional*, defaults to `8`):
            Number of consecutive skipped optimizer steps that ends the run. A step is skipped if a loss, a gradient or
            every completion's score is not finite. Single completions with such a score are left out.
        allow_pickled_weights (`bool`, *optional*, defaults to `False`):
            Whether to load models whose weights exist only as pickles (`.bin`), like some older models on the hub.
            Pickles with anything but tensors are always refused.
        bf16 (`bool`, *optional*):
            Mixed precision in bfloat16. If neither `fp16` nor `bf16` is set, the precision is the one chosen in
            `accelerate launch`, or else bfloat16 on CUDA devices that support it (compute capability 8.0 and above).
            TRL's default is `True` everywhere.
    """

    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher, as JSON."}
    )
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers: a name, a folder or addresses of servers for each value of teacher_column."
        },
    )
    teacher_column: str = field(
        default="teacher", metadata={"help": "Column that chooses the teacher of a row, if there are several."}
    )
    teacher_server_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "Addresses of servers with the teacher (serve-teacher or vLLM), instead of a local teacher."
        },
    )
    teacher_server_top_k: int = field(
        default=64, metadata={"help": "The teacher's most likely tokens that a server returns for each token."}
    )
    teacher_server_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Whose most likely tokens are listed; by default the student's, with vLLM the teacher's.",
            "choices": ["student", "teacher"],
        },
    )
    teacher_server_batch_size: int = field(default=16, metadata={"help": "Completions of one request to a server."})
    teacher_server_timeout: float = field(default=600.0, metadata={"help": "Seconds to wait for a server's answer."})
    teacher_server_retries: int = field(
        default=10, metadata={"help": "Failures in a row after which a server is given up."}
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
        default=True, metadata={"help": "Discount the length in this mean like the rewards."}
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
            "help": "Include the current token's reward in its return; by default only without the single step."
        },
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Divisor of the teacher's rewards."})
    reward_clip: float | None = field(default=None, metadata={"help": "Maximum absolute value of a scaled reward."})
    reward_estimator: str = field(
        default="sampled",
        metadata={
            "help": "Future rewards of a return: of the sampled tokens, or expected given the tokens before.",
            "choices": list(REWARD_ESTIMATORS),
        },
    )
    advantage_baseline: str = field(
        default="none",
        metadata={
            "help": "Baseline of the teacher's returns: none, or leave-one-out by position, over the rollout buffer "
            "or the completions of the prompt.",
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
        metadata={"help": "Temperature of rewards and single-step term; by default the sampling temperature."},
    )
    loss_reduction: str = field(
        default="token_mean",
        metadata={
            "help": "`token_mean` over the optimizer step, or `sequence_sum` (mean over completions).",
            "choices": ["token_mean", "sequence_sum"],
        },
    )
    eos_tokens: list[str] | None = field(default=None, metadata={"help": EOS_TOKENS_HELP})
    teacher_hidden_states: str = field(
        default="device",
        metadata={
            "help": "Where to keep the teacher's hidden states for the inner passes.",
            "choices": ["device", "cpu", "recompute"],
        },
    )
    offload_teacher: bool = field(
        default=False, metadata={"help": "Move the teacher to the CPU during updates of the student."}
    )
    shard_teacher: bool = field(
        default=False, metadata={"help": "Shard the teacher's transformer blocks over the processes."}
    )
    teacher_shares_base: bool = field(
        default=False, metadata={"help": "The teacher is an adapter on the student's base model, which both share."}
    )
    lm_coef: float = field(default=1.0, metadata={"help": "Weight of the language-modelling loss on lm_dataset."})
    lm_kd_ratio: float = field(
        default=0.0, metadata={"help": "Share of forward KL to the teacher in that loss, in [0, 1]."}
    )
    lm_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences of lm_dataset in a micro-batch; by default per_device_train_batch_size."},
    )
    lm_max_length: int = field(default=512, metadata={"help": "Maximum number of tokens in a sequence of lm_dataset."})
    num_generations: int = field(default=1, metadata={"help": "Completions sampled per prompt."})
    disable_dropout: bool = field(default=True, metadata={"help": "Disable the student's dropout in training."})

    max_nonfinite_steps: int = field(
        default=8,
        metadata={"help": "End the run after this many consecutive steps skipped for NaN or infinity."},
    )
    allow_pickled_weights: bool = field(
        default=False, metadata={"help": "Load models whose weights exist only as pickles (.bin)."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's own annotation forgets ClassVar
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "teachers",
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
        check_config(self)

    def reshaping_fields(self) -> list[str]:
        """Return the names of the set fields that make sampling differ from softmax(logits / temperature)."""
        return [name for name, neutral in RESHAPING_FIELDS.items() if getattr(self, name) not in neutral]
