"""Checks of the fields of `FamilyConfig`: values, and combinations that have no effect."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..divergences import DIVERGENCES
from ..errors import UserError

if TYPE_CHECKING:
    from ..config import MiniLLMConfig


def check_family(args: "MiniLLMConfig") -> None:
    """Check the fields of [`FamilyConfig`] of a configuration.

    Raises:
        ValueError: with the field, its value and the fix.
    """
    if args.cross_tokenizer:
        _check_cross_tokenizer(args)
    _check_divergence(args)
    _check_positions(args)
    _check_text(args)


def default_of(args: "MiniLLMConfig", name: str) -> Any:
    """Return the default of a field."""
    return next(field.default for field in fields(args) if field.name == name)


def _check_divergence(args: "MiniLLMConfig") -> None:
    chosen = args.single_step_divergence
    if chosen not in DIVERGENCES:
        raise UserError(f"single_step_divergence must be one of {tuple(DIVERGENCES)}, got {chosen!r}.")
    for name in ("forward_kl_share", "jsd_beta"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            raise UserError(f"{name} must lie in [0, 1], got {getattr(args, name)}.")
    if not 0.0 <= args.skew_alpha < 1.0:
        raise UserError(f"skew_alpha must lie in [0, 1), got {args.skew_alpha}.")
    if not args.teacher_entropy_threshold >= 0.0:
        raise UserError(f"teacher_entropy_threshold must not be negative, got {args.teacher_entropy_threshold}.")
    if chosen != "reverse_kl" and not args.single_step_decomposition:
        raise UserError(
            f"single_step_divergence={chosen!r} has no effect with single_step_decomposition=False, which leaves out "
            "the single step. Drop one of them."
        )
    for parameter in filter(None, dict.fromkeys(DIVERGENCES.values())):
        value = getattr(args, parameter)
        takers = [name for name, taken in DIVERGENCES.items() if taken == parameter]
        if value != default_of(args, parameter) and chosen not in takers:
            raise UserError(
                f"{parameter}={value} has no effect with single_step_divergence={chosen!r}: it is the parameter of "
                f"{' and '.join(takers)}. Drop it, or choose one of these."
            )


def _check_positions(args: "MiniLLMConfig") -> None:
    if not 0.0 < args.top_entropy_quantile <= 1.0:
        raise UserError(f"top_entropy_quantile must lie in (0, 1], got {args.top_entropy_quantile}.")
    if not args.iw_opd_gamma >= 0.0:
        raise UserError(f"iw_opd_gamma must not be negative, got {args.iw_opd_gamma}.")
    start, steps, limit = args.horizon_start, args.horizon_steps, args.max_completion_length
    if start is None:
        if steps is not None:
            raise UserError(
                f"horizon_steps={steps} has no effect without horizon_start. Set it, or drop horizon_steps."
            )
        return
    assert limit is not None  # checked before
    if not 1 <= start <= limit:
        raise UserError(f"horizon_start must lie in [1, max_completion_length={limit}], got {start}.")
    if steps is not None and steps < 1:
        raise UserError(f"horizon_steps must be at least 1, got {steps}.")
    _refuse_trl_decoding(args, f"horizon_start={start}", "or lower max_completion_length")


def _check_text(args: "MiniLLMConfig") -> None:
    if not 0.0 <= args.lmbda <= 1.0:
        raise UserError(f"lmbda must lie in [0, 1], got {args.lmbda}.")
    if args.skd_top_k is not None and args.skd_top_k < 1:
        raise UserError(f"skd_top_k must be at least 1, got {args.skd_top_k}.")
    settings = {}
    if args.lmbda < 1.0:
        settings[f"lmbda={args.lmbda}"] = "lmbda=1.0"
    if args.skd_top_k is not None:
        settings[f"skd_top_k={args.skd_top_k}"] = "skd_top_k=None"
    for setting, off in settings.items():
        _check_single_step_alone(args, setting, off)
        _refuse_trl_decoding(args, setting, f"or set {off}")
    if args.skd_top_k is not None and args.shard_teacher:
        raise UserError(
            f"skd_top_k={args.skd_top_k} calls the teacher by the drafts of each process, but with shard_teacher=True "
            "all processes have to call it together. Drop one of them."
        )


def _check_single_step_alone(args: "MiniLLMConfig", setting: str, off: str) -> None:
    needed_values = {"rkl_advantage": False, "teacher_mixed_alpha": 0.0, "importance_weighting": "token", "beta": 0.0}
    for name, needed in needed_values.items():
        value = getattr(args, name)
        if value != needed:
            raise UserError(
                f"{setting} trains on texts that neither student nor mixture has sampled, but {name}={value!r} needs "
                f"their probabilities. Set {name}={needed!r}, or {off}."
            )


def _refuse_trl_decoding(args: "MiniLLMConfig", setting: str, way_out: str) -> None:
    names = [name for name in ("use_vllm",) if getattr(args, name)] + args.reshaping_fields()
    for name in names:
        raise UserError(
            f"{setting} changes rollouts of our own decoding, but {name}={getattr(args, name)!r} samples with TRL's. "
            f"Drop one of them, {way_out}."
        )


# With another tokenizer of the teacher: the fields that need one vocabulary, the values that do not, and the reason
_ONE_VOCABULARY: dict[str, tuple[Any, str]] = {
    "single_step_decomposition": (False, "the single step compares next-token distributions over one vocabulary"),
    "teacher_mixed_alpha": (0.0, "the teacher cannot draw tokens of the student"),
    "rkl_advantage": (True, "only the returns of the teacher's rewards are left to learn from it"),
    "include_current_reward": (True, "without the single step, the return needs a token's own reward"),
    "reward_estimator": ("sampled", "an expected reward compares next-token distributions over one vocabulary"),
    "lmbda": (1.0, "returns need the probabilities of whoever wrote the given texts"),
    "skd_top_k": (None, "the teacher cannot replace tokens of the student"),
    "lm_kd_ratio": (0.0, "its forward KL compares next-token distributions over one vocabulary"),
    "iw_opd_gamma": (0.0, "rewards belong to spans, and not to the tokens that it weighs"),
    "teacher_server_url": (None, "a server scores tokens of the student"),
    "offline_teacher": (None, "stored scores are those of tokens of the student"),
    "teacher_shares_base": (False, "models with one base have one tokenizer"),
    "teacher_hidden_states": ("device", "no hidden states of the teacher are kept"),
}


def _check_cross_tokenizer(args: "MiniLLMConfig") -> None:
    for name, (needed, reason) in _ONE_VOCABULARY.items():
        value = getattr(args, name)
        if value != needed:
            raise UserError(
                f"{name}={value!r} does not work with cross_tokenizer=True: {reason}. Set {name}={needed!r}, or drop "
                "cross_tokenizer and choose a teacher with the student's tokenizer."
            )
    if args.gamma == 0.0:
        raise UserError(
            "gamma=0.0 keeps only the reward at a token itself, but with cross_tokenizer=True the reward of a span is "
            "credited to the token after it. Set gamma=1.0."
        )
