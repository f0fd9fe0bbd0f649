"""Checks of a `MiniLLMConfig`: values, combinations that have no effect, and fields of GRPO that do not apply."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from ..errors import UserError
from ..models.init_kwargs import parsed_kwargs
from ..models.weight_formats import check_init_kwargs, quantization_settings, refuse_8bit_teacher
from ..objectives import REWARD_ESTIMATORS, WEIGHTING_LEVELS
from ..teacher_server.addresses import base_urls, is_address, served_names
from ..teacher_server.settings import check_server_settings
from .family_checks import check_family
from .rollout_device import check_rollout_device

if TYPE_CHECKING:
    from ..config import MiniLLMConfig

# Settings that change sampling from softmax(logits / temperature), with their neutral values
RESHAPING_FIELDS: dict[str, tuple] = {
    "top_p": (1.0,),
    "top_k": (0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
    "cache_implementation": (None,),
}

# Inherited fields that MiniLLM replaces, or that would bias it: only their default is accepted
REFUSED_FIELDS: dict[str, str] = {
    "loss_type": "MiniLLM has its own loss; choose its reduction with `loss_reduction`",
    "sapo_temperature_neg": "it belongs to `loss_type='sapo'`",
    "sapo_temperature_pos": "it belongs to `loss_type='sapo'`",
    "vespo_k_pos": "it belongs to `loss_type='vespo'`",
    "vespo_lambda_pos": "it belongs to `loss_type='vespo'`",
    "vespo_k_neg": "it belongs to `loss_type='vespo'`",
    "vespo_lambda_neg": "it belongs to `loss_type='vespo'`",
    "importance_sampling_level": (
        "GRPO's sequence level is a geometric mean, not an importance weight; set `importance_weighting`"
    ),
    "entropy_coef": "reverse KL contains the student's entropy with weight 1 already",
    "use_adaptive_entropy": "reverse KL contains the student's entropy with weight 1 already",
    "entropy_coef_min": "there is no entropy bonus",
    "entropy_coef_max": "there is no entropy bonus",
    "entropy_coef_delta": "there is no entropy bonus",
    "entropy_target": "there is no entropy bonus",
    "off_policy_mask_threshold": "the clipped ratio to the behavior policy has this role",
    "mask_truncated_completions": "a truncated completion is a complete sample of the problem with that horizon",
    "cast_lm_head_to_fp32": "the LM head's logits are reduced in float32 already",
    "use_liger_kernel": "its kernels need Triton and would bypass the scoring forward",
    "use_transformers_continuous_batching": "it permanently casts the trained weights to half precision",
    "use_transformers_paged": "it permanently casts the trained weights to half precision",
    "transformers_continuous_batching_config": "continuous batching is refused",
    "router_aux_loss_coef": "the loss has no load-balancing term for mixture-of-experts models",
    "pad_to_multiple_of": "the decode loop pads to the longest row",
    "ds3_gather_for_generation": "under ZeRO-3, rollouts are sampled from a complete copy of the student",
    "log_multimodal": "there are no images",
    "neftune_noise_alpha": "noise in the embeddings would train a different distribution than the sampling one",
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
    "compile_rollouts": (None, "inductor", "cudagraphs", "auto"),
    "mixing": ("coins", "speculative", "auto"),
}


def check_config(args: "MiniLLMConfig") -> None:
    """Check the fields of a configuration, after its `__post_init__` has filled them in.

    Raises:
        ValueError: with the field, its value and the fix.
    """
    _check_values(args)
    _check_long_term(args)
    check_family(args)
    _check_weights(args)
    _check_memory(args)
    _check_overlap(args)
    check_rollout_device(args)
    if args.teachers is not None:
        _check_teachers(args)
    check_server_settings(args)
    _check_mixing(args)
    _check_sampling(args)
    _check_inherited(args)
    assert args.steps_per_generation is not None  # set by GRPOConfig
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise UserError(
            f"steps_per_generation={args.steps_per_generation} must be a multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: an optimizer step is normalised by the tokens of one rollout "
            "buffer. Raise steps_per_generation (or generation_batch_size), or lower gradient_accumulation_steps."
        )


def _check_values(args: "MiniLLMConfig") -> None:
    if args.max_completion_length is None:
        raise UserError("max_completion_length must be set: it is the horizon of the objective.")
    for name in ("teacher_mixed_alpha", "gamma", "lm_kd_ratio"):
        value = getattr(args, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{name} must lie in [0, 1], got {value}.")
    for name in _POSITIVE_FIELDS:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} must be positive, got {value}.")
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        if value not in choices:
            raise UserError(f"{name} must be one of {choices}, got {value!r}.")
    if args.beta < 0:
        raise UserError(f"beta must not be negative, got {args.beta}.")
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None and not args.delta > 1 + high:
        raise UserError(f"delta must be above the clip range, which ends at {1 + high}, got {args.delta}.")
    if args.importance_weight_cap is not None and args.importance_weighting == "token":
        raise UserError(
            f"importance_weight_cap={args.importance_weight_cap} has no effect with importance_weighting='token', "
            "whose ratio is clipped instead. Set epsilon (or delta, for negative advantages), or another weighting."
        )


def _check_weights(args: "MiniLLMConfig") -> None:
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        check_init_kwargs(name, getattr(args, name))
    quantization = quantization_settings(parsed_kwargs(args.teacher_model_init_kwargs))
    refuse_8bit_teacher(quantization.get("load_in_8bit", False), args.teacher_mixed_alpha)


def _check_long_term(args: "MiniLLMConfig") -> None:
    for name, neutral in (("reward_estimator", "sampled"), ("advantage_baseline", "none")):
        value = getattr(args, name)
        if not args.rkl_advantage and value != neutral:
            raise UserError(
                f"{name}={value!r} has no effect with rkl_advantage=False, which leaves out the returns of the "
                f"teacher's rewards. Drop {name}, or set rkl_advantage=True."
            )
    if args.advantage_baseline == "group" and args.num_generations == 1:
        raise UserError(
            "advantage_baseline='group' is a mean over the other completions of a prompt, but num_generations=1: "
            "set num_generations to 2 or more, or advantage_baseline='position'."
        )
    mixed = args.teacher_mixed_alpha > 0.0 and args.shared_coins and args.mixing != "speculative"
    if args.advantage_baseline != "none" and args.importance_weighting == "sequence" and mixed:
        raise UserError(
            f"advantage_baseline={args.advantage_baseline!r} averages over rows that share their coins "
            "(shared_coins=True). This biases the gradient, which importance_weighting='sequence' should make exact. "
            "Set shared_coins=False, or mixing='speculative'."
        )


def _check_memory(args: "MiniLLMConfig") -> None:
    if args.half_precision_rollouts and not (args.fp16 or args.bf16):
        raise UserError(
            "half_precision_rollouts=True uses the precision of fp16 or bf16, but neither is set. Set one of them, or "
            "half_precision_rollouts=False."
        )
    samples_with_vllm = args.use_vllm and args.teacher_mixed_alpha == 0.0  # with mixing, vLLM only drafts
    for name in ("merged_rollouts", "compile_rollouts"):
        if (value := getattr(args, name)) and (samples_with_vllm or args.reshaping_fields()):
            other = "use_vllm" if args.use_vllm else args.reshaping_fields()[0]
            raise UserError(
                f"{name}={value!r} has no effect with {other}={getattr(args, other)!r}, as TRL samples then. Drop one "
                "of them."
            )
    for name in ("offload_teacher", "shard_teacher"):
        if args.teacher_shares_base and getattr(args, name):
            raise UserError(
                f"{name}=True and teacher_shares_base=True: the teacher's weights are also the student's, so they "
                "cannot be moved. Drop one of them."
            )
    if args.teacher_shares_base and args.teacher_model_init_kwargs:
        raise UserError(
            f"teacher_model_init_kwargs={args.teacher_model_init_kwargs} has no effect with "
            "teacher_shares_base=True, as only an adapter is loaded. Drop one of them."
        )
    if args.offload_teacher and args.shard_teacher:
        raise UserError(
            "offload_teacher=True and shard_teacher=True: sharded weights cannot be offloaded. Drop offload_teacher; "
            "a sharded teacher takes little memory."
        )
    for name, value in (("teacher_hidden_states", "recompute"), ("lm_kd_ratio", args.lm_kd_ratio or None)):
        if args.offload_teacher and getattr(args, name) == value:
            raise UserError(
                "offload_teacher=True keeps the teacher on the CPU during the inner passes, but "
                f"{name}={value!r} runs it in them. Drop one of them."
            )


def _check_overlap(args: "MiniLLMConfig") -> None:
    """Check that the next rollout can be sampled in a thread while the student is updated.

    Raises:
        UserError: with the field that a thread does not work with.
    """
    if not args.overlap_rollouts:
        return
    asks_server = args.teacher_server_url is not None or bool(served_names(args))
    runs_teacher = "it runs the teacher in the updates, while the rollout runs it too"
    not_of_copy = "its completions would be scored by the trained student, not by the copy that sampled"
    reasons: dict[str, tuple[bool, str]] = {
        "use_vllm": (args.use_vllm, "vLLM is called by the thread that updates"),
        **dict.fromkeys(args.reshaping_fields(), (True, "TRL samples then, from the trained student")),
        "compile_rollouts": (args.compile_rollouts is not None, "torch.compile does not run in two threads"),
        "teacher_hidden_states": (args.teacher_hidden_states == "recompute", runs_teacher),
        "lm_kd_ratio": (args.lm_kd_ratio > 0.0, runs_teacher),
        "offload_teacher": (args.offload_teacher, "the rollout needs the teacher during the updates"),
        "shard_teacher": (args.shard_teacher, "two threads would gather weights from the other processes"),
        "lmbda": (args.lmbda < 1.0, not_of_copy),
        "skd_top_k": (args.skd_top_k is not None, not_of_copy),
        "reward_estimator": (
            asks_server and args.reward_estimator == "expected",
            "the thread would ask the teacher's servers, and a failure could not be resumed exactly",
        ),
        "ignore_data_skip": (args.ignore_data_skip, "the rows of the next rollout follow from the optimizer step"),
        "dataloader_num_workers": (args.dataloader_num_workers > 0, "processes are not forked while a thread samples"),
    }
    for name, (is_set, reason) in reasons.items():
        if is_set:
            raise UserError(
                f"{name}={getattr(args, name)!r} does not work with overlap_rollouts=True: {reason}. Drop {name}, or "
                "set overlap_rollouts=False."
            )


def check_teacher_names(teachers: Mapping[str, Any], field: str) -> None:
    """Check the names of several teachers, which are values of a column and parts of the names of metrics.

    Raises:
        UserError: naming the field and the name.
    """
    if not teachers:
        raise UserError(f"{field} is empty. Give a teacher for each value of teacher_column.")
    for name in teachers:
        if not isinstance(name, str) or not name or "/" in name:
            raise UserError(f"{field}: the name {name!r} must be a text without '/', the value of teacher_column.")


def refuse_with_several_teachers(args: "MiniLLMConfig") -> None:
    """Refuse settings that need a single teacher.

    Raises:
        UserError: with the field, its value and the fix.
    """
    refused: dict[str, tuple[Any, str]] = {
        "cross_tokenizer": (False, "it is for one teacher with another tokenizer"),
        "lm_kd_ratio": (0.0, "the rows of the corpus of L_PT have no teacher"),
        "shard_teacher": (False, "processes would need a sharded teacher for different numbers of rows"),
    }
    for name, (neutral, reason) in refused.items():
        if (value := getattr(args, name)) != neutral:
            raise UserError(f"{name}={value} does not work with several teachers: {reason}. Set it to {neutral}.")
    if args.mixing == "auto":
        raise UserError(
            "mixing='auto' measures a single teacher. With several teachers, set mixing to 'coins' or 'speculative'."
        )


def _check_teachers(args: "MiniLLMConfig") -> None:
    assert isinstance(args.teachers, dict)  # parsed by GRPOConfig
    for name in ("teacher_server_url", "offline_teacher"):
        if getattr(args, name) is not None:
            raise UserError(f"teachers and {name} are both given. Drop one of them.")
    check_teacher_names(args.teachers, "teachers")
    for name, teacher in args.teachers.items():
        if is_address(teacher):
            args.teachers[name] = base_urls(teacher, "teachers")
        elif not isinstance(teacher, str):
            raise UserError(f"teachers[{name!r}] must be a name, a folder, or addresses of servers, got {teacher!r}.")
    refuse_with_several_teachers(args)


def _check_mixing(args: "MiniLLMConfig") -> None:
    if args.mixing == "coins":
        return
    reasons = {
        "teacher_mixed_alpha": (args.teacher_mixed_alpha == 0.0, "nothing is mixed"),
        "shard_teacher": (args.shard_teacher, "processes would need a sharded teacher after different tokens"),
        "compile_rollouts": (args.compile_rollouts, "dropped drafts cannot be taken out of a compiled cache"),
    }
    for name, (is_set, reason) in reasons.items():
        if is_set:
            raise UserError(
                f"mixing={args.mixing!r} does not work with {name}={getattr(args, name)!r}: {reason}. "
                f"Set mixing='coins', or drop {name}."
            )


def _check_sampling(args: "MiniLLMConfig") -> None:
    if args.teacher_mixed_alpha == 0.0:
        return
    if args.use_vllm:
        _check_vllm_mixing(args)
    for name in args.reshaping_fields():
        raise UserError(
            f"{name}={getattr(args, name)!r} reshapes the sampling distribution, but the importance weights assume "
            f"the plain mixture. Drop {name}, or set teacher_mixed_alpha=0.0."
        )


def _check_vllm_mixing(args: "MiniLLMConfig") -> None:
    """Check that vLLM can draft for speculative mixing."""
    needed: dict[str, tuple[Any, str]] = {
        "mixing": ("speculative", "vLLM cannot toss a coin before each token"),
        "vllm_mode": ("colocate", "it drafts in the process of the trainer"),
        "vllm_tensor_parallel_size": (1, "processes would need vLLM for different numbers of drafts"),
        "vllm_enable_sleep_mode": (False, "a rollout uses both vLLM and the student"),
        "vllm_structured_outputs_regex": (None, "it reshapes the sampling distribution"),
    }
    for name, (value, reason) in needed.items():
        if (given := getattr(args, name)) != value and (name, given) != ("mixing", "auto"):
            raise UserError(
                f"{name}={given!r} does not work with use_vllm=True and teacher_mixed_alpha="
                f"{args.teacher_mixed_alpha}: {reason}. Set {name}={value!r}, or teacher_mixed_alpha=0.0 to sample "
                "from the student alone."
            )


def _check_inherited(args: "MiniLLMConfig") -> None:
    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
    for name, reason in REFUSED_FIELDS.items():
        value = getattr(args, name)
        if name == "pad_to_multiple_of":  # GRPOConfig has resolved "auto" to None
            defaults[name] = None
        if value != defaults[name]:
            raise UserError(f"{name}={value!r} is not supported by MiniLLM: {reason}. Leave it at {defaults[name]!r}.")

    if getattr(args.accelerator_config, "split_batches", False):  # parsed by TrainingArguments
        raise UserError(
            "accelerator_config.split_batches=True would split a rollout's prompts over the processes twice. Set it "
            "to False."
        )
