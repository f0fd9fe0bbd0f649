"""Named settings of `MiniLLMConfig`, one for each method of docs/family.md.

    MiniLLMConfig("runs/gkd", **preset("gkd"))
    MiniLLMConfig("runs/gkd", **preset("gkd", jsd_beta=0.1))

A preset sets the fields of the objective. Lengths, batches and learning rates depend on the machine and the task.
"""

from typing import Any

from .errors import UserError

__all__ = ["PRESETS", "preset"]

# The student's own text, and a single step without a long term
_SINGLE_STEP: dict[str, Any] = {"teacher_mixed_alpha": 0.0, "rkl_advantage": False, "single_step_decomposition": True}
# The student's own text, and the reward of each token as its advantage
_SAMPLED: dict[str, Any] = {
    **{"teacher_mixed_alpha": 0.0, "rkl_advantage": True, "single_step_decomposition": False},
    **{"include_current_reward": True, "gamma": 0.0, "length_normalization": False},
}

PRESETS: dict[str, dict[str, Any]] = {
    # 2306.08543
    "minillm": {
        **{"teacher_mixed_alpha": 0.2, "importance_weighting": "token", "epsilon": 0.2, "rkl_advantage": True},
        **{"gamma": 1.0, "length_normalization": True, "single_step_decomposition": True},
        **{"single_step_divergence": "reverse_kl", "temperature": 1.0},
    },
    # exact reverse KL of each token, as TRL's DistillationTrainer by default
    "opd": {**_SINGLE_STEP, "single_step_divergence": "reverse_kl"},
    # the same from sampled tokens, as a policy gradient
    "opd_sampled": _SAMPLED,
    "forward_kl": {**_SINGLE_STEP, "single_step_divergence": "forward_kl"},
    # 2605.16826
    "mixed_kl": {**_SINGLE_STEP, "single_step_divergence": "mixed_kl", "forward_kl_share": 0.5},
    # 2306.13649
    "gkd": {**_SINGLE_STEP, "single_step_divergence": "generalized_jsd", "jsd_beta": 0.5, "lmbda": 0.5},
    # 2604.13010; the scores of an absent teacher are in `offline_teacher`
    "lightning_opd": {**_SINGLE_STEP, "single_step_divergence": "reverse_kl", "lmbda": 0.0},
    # 2402.03898
    "distillm": {**_SINGLE_STEP, "single_step_divergence": "skewed_reverse_kl", "skew_alpha": 0.1},
    "distillm_forward": {**_SINGLE_STEP, "single_step_divergence": "skewed_forward_kl", "skew_alpha": 0.1},
    # 2410.11325
    "skd": {**_SINGLE_STEP, "single_step_divergence": "forward_kl", "skd_top_k": 25},
    # 2603.07079
    "entropy_aware": {
        **_SINGLE_STEP,
        **{"single_step_divergence": "entropy_aware_kl", "teacher_entropy_threshold": 0.8},
    },
    # 2606.01249
    "trust_region": {**_SINGLE_STEP, "single_step_divergence": "trust_region_kl"},
    # 2604.14084
    "tip": {**_SINGLE_STEP, "single_step_divergence": "reverse_kl", "top_entropy_quantile": 0.5},
    # 2606.22600
    "iw_opd": {**_SAMPLED, "iw_opd_gamma": 0.5},
    # the long term alone, by spans of text
    "cross_tokenizer": {
        **{"cross_tokenizer": True, "teacher_mixed_alpha": 0.0, "rkl_advantage": True},
        **{"single_step_decomposition": False, "include_current_reward": True, "gamma": 1.0},
    },
}


def preset(name: str, **own: Any) -> dict[str, Any]:
    """Return the fields of a preset, overridden by your own.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
    return {**PRESETS[name], **own}
