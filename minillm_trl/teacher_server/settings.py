"""Checks of the fields `teacher_server_*` of a `MiniLLMConfig`."""

from typing import TYPE_CHECKING

from ..divergences import DIVERGENCES
from ..errors import UserError
from .addresses import base_urls, served_names

if TYPE_CHECKING:
    from ..config import MiniLLMConfig

# Fields that only apply with servers, and their defaults
SERVER_FIELDS = {
    "teacher_server_top_k": 64,
    "teacher_server_tokens": None,
    "teacher_server_batch_size": 16,
    "teacher_server_timeout": 600.0,
    "teacher_server_retries": 10,
}

# Fields that a teacher outside this process cannot follow: their neutral values, and why
_REFUSED: dict[str, tuple[tuple, str]] = {
    "teacher_mixed_alpha": (
        (0.0,),
        "a server scores completions, but samples no tokens in turn with the student: set teacher_mixed_alpha=0.0",
    ),
    "skd_top_k": ((None,), "a server samples no tokens: drop it"),
    "lm_kd_ratio": ((0.0,), "the teacher does not score the corpus of L_PT: set lm_kd_ratio=0.0"),
    "single_step_divergence": (
        tuple(name for name in DIVERGENCES if name != "entropy_aware_kl"),
        "the teacher's entropy needs its whole distribution: choose another divergence",
    ),
    "teacher_hidden_states": (
        ("device", "cpu"),
        "the scores of a rollout are requested once: set teacher_hidden_states to 'device' or 'cpu'",
    ),
    "offload_teacher": ((False,), "no process of this run holds the teacher: drop it"),
    "shard_teacher": ((False,), "no process of this run holds the teacher: drop it"),
    "teacher_shares_base": ((False,), "no process of this run holds the teacher: drop it"),
    "teacher_model_init_kwargs": ((None, {}), "the server loads the teacher: set them there (--model_init_kwargs)"),
}


def check_server_settings(args: "MiniLLMConfig") -> None:
    """Check the fields of a teacher on servers against the others, and complete the addresses.

    Raises:
        UserError: with the field, its value and the fix.
    """
    if args.offline_teacher is not None:
        _check_offline(args)
    if args.teacher_server_url is None and not served_names(args):
        for name, default in SERVER_FIELDS.items():
            if getattr(args, name) != default:
                raise UserError(f"{name}={getattr(args, name)} has no effect without teacher_server_url. Drop it.")
        return
    if args.teacher_server_url is not None:
        args.teacher_server_url = base_urls(args.teacher_server_url, "teacher_server_url")
    for name in ("teacher_server_top_k", "teacher_server_batch_size", "teacher_server_timeout"):
        if not getattr(args, name) > 0:
            raise UserError(f"{name} must be positive, got {getattr(args, name)}.")
    if args.teacher_server_tokens not in (None, "student", "teacher"):
        raise UserError(f"teacher_server_tokens must be student or teacher, got {args.teacher_server_tokens!r}.")
    if args.teacher_server_retries < 0:
        raise UserError(f"teacher_server_retries must not be negative, got {args.teacher_server_retries}.")
    field = "teacher_server_url" if args.teacher_server_url is not None else "a server's address in teachers"
    _refuse(args, field, _REFUSED)


def _refuse(args: "MiniLLMConfig", because: str, refused: dict[str, tuple[tuple, str]]) -> None:
    for name, (neutral, reason) in refused.items():
        value = getattr(args, name)
        if value not in neutral:
            raise UserError(f"{name}={getattr(value, 'value', value)!r} does not work with {because}: {reason}.")
    if args.kd_temperature not in (None, args.temperature):
        raise UserError(
            f"kd_temperature={args.kd_temperature} does not work with {because}: scores are those at the sampling "
            f"temperature ({args.temperature}) only. Drop kd_temperature."
        )


def _check_offline(args: "MiniLLMConfig") -> None:
    """Check the fields that stored scores of given completions cannot follow."""
    given = "only given completions have scores"
    own: dict[str, tuple[tuple, str]] = {
        "teacher_server_url": ((None,), "the scores are in the folder: drop one of them"),
        "teacher_mixed_alpha": ((0.0,), f"{given}: set teacher_mixed_alpha=0.0"),
        "skd_top_k": ((None,), f"{given}: drop it"),
        "teacher_model_init_kwargs": ((None, {}), "give them to `minillm-trl offline-teacher --model_init_kwargs`"),
        "lmbda": ((0.0,), f"{given}: set lmbda=0.0 (preset lightning_opd)"),
        "horizon_start": ((None,), "completions are scored with max_completion_length: drop it"),
        "eval_strategy": (("no",), f"{given}, and evaluation samples: set it to 'no', and evaluate checkpoints later"),
    }
    _refuse(args, "offline_teacher", _REFUSED | own)
