"""The methods on the frontier: training runs of the same student on the same prompts, in about the same time."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from methods import MINILLM, SAMPLED, SUPERVISED, Method

from minillm_trl.presets import PRESETS

UPDATES = 320  # of MiniLLM; the others get about its CPU time
# Temperatures of rollouts, rewards and single step where it is not 1
COOL = 0.55
COLD = 0.4


def _minillm(label: str, **options: Any) -> Method:
    return Method(label, "minillm", UPDATES, {**MINILLM, **options})


def _distillation(label: str, temperature: float) -> Method:
    options = {**SAMPLED, "beta": 1.0, "top_k": 0, "temperature": temperature}
    return Method(label, "distillation", 92, options)


_NO_MIXING: dict[str, Any] = {"teacher_mixed_alpha": 0.0}
_NO_LONG_TERM: dict[str, Any] = {"rkl_advantage": False}
_LOW_VARIANCE: dict[str, Any] = {"reward_estimator": "expected", "advantage_baseline": "position"}
_PLAIN: dict[str, Any] = {"length_normalization": False}
_PREFIX: dict[str, Any] = {"horizon_start": 8, "horizon_steps": UPDATES // 2}

MAIN = {
    "sft": Method("SFT continued", "sft", 330, SUPERVISED),
    "kd": Method("KD", "kd", 320, SUPERVISED),
    "seqkd": Method("SeqKD", "seqkd", 380, SUPERVISED),
    "gkd": Method("TRL GKD", "gkd", 77, {**SAMPLED, "lmbda": 0.5, "beta": 0.5}),
    "distillation": _distillation("TRL DistillationTrainer", 1.0),
    "distillation_at_one": _distillation("TRL DistillationTrainer, rate for temperature 1", 1.0),
    "distillation_cool": _distillation(f"TRL DistillationTrainer, trained at {COOL}", COOL),
    "distillation_cold": _distillation(f"TRL DistillationTrainer, trained at {COLD}", COLD),
    "minillm": _minillm("MiniLLM (the paper's)"),
    "single_step": _minillm("single step alone, no mixing", **_NO_LONG_TERM, **_NO_MIXING),
    "single_step_cool": _minillm(
        f"single step alone, no mixing, trained at {COOL}", **_NO_LONG_TERM, **_NO_MIXING, temperature=COOL
    ),
    "single_step_cold": _minillm(
        f"single step alone, no mixing, trained at {COLD}", **_NO_LONG_TERM, **_NO_MIXING, temperature=COLD
    ),
    "low_variance_normalised": _minillm(
        "MiniLLM, expected rewards, baseline, no mixing", **_LOW_VARIANCE, **_NO_MIXING
    ),
    "low_variance_normalised_cool": _minillm(
        f"MiniLLM, expected rewards, baseline, no mixing, trained at {COOL}",
        **_LOW_VARIANCE,
        **_NO_MIXING,
        temperature=COOL,
    ),
    "low_variance": _minillm(
        "MiniLLM, expected rewards, baseline, no mixing, no length normalisation",
        **_LOW_VARIANCE,
        **_NO_MIXING,
        **_PLAIN,
    ),
    "low_variance_cool": _minillm(
        f"MiniLLM, expected rewards, baseline, no mixing, no length normalisation, trained at {COOL}",
        **_LOW_VARIANCE,
        **_NO_MIXING,
        **_PLAIN,
        temperature=COOL,
    ),
    "low_variance_cold": _minillm(
        f"MiniLLM, expected rewards, baseline, no mixing, no length normalisation, trained at {COLD}",
        **_LOW_VARIANCE,
        **_NO_MIXING,
        **_PLAIN,
        temperature=COLD,
    ),
}

# The rate with the highest Rouge-L at temperature 1 on the validation prompts, where the search chooses a lower one
FIXED_RATES = {"distillation_at_one": 3e-3}

# Every kind of long term, with and without length normalisation and mixing; without a long term nothing is normalised
_LONG_TERMS: dict[str, dict[str, Any]] = {
    "none": _NO_LONG_TERM,
    "sampled": {},
    "expected": {"reward_estimator": "expected"},
    "baseline": {"advantage_baseline": "position"},
    "both": _LOW_VARIANCE,
}
ABLATIONS = {
    f"{name}{'-plain' if plain else ''}-{alpha:g}": _minillm(
        name, **options, **(_PLAIN if plain else {}), teacher_mixed_alpha=alpha
    )
    for name, options in _LONG_TERMS.items()
    for plain in ((False,) if name == "none" else (False, True))
    for alpha in (0.2, 0.0)
}
# Returns that fade with the distance: between the whole future (gamma 1) and the single step alone (gamma 0)
ABLATIONS |= {
    f"both-plain-0-gamma{gamma:g}": _minillm("both", **_LOW_VARIANCE, **_PLAIN, **_NO_MIXING, gamma=gamma)
    for gamma in (0.95, 0.8)
}
# The rows that the main table has too
SAME_AS = {
    "none-0": "single_step",
    "sampled-0.2": "minillm",
    "both-0": "low_variance_normalised",
    "both-plain-0": "low_variance",
}


def _family(label: str, preset: str, **options: Any) -> Method:
    return _minillm(label, **PRESETS[preset] | options | {"temperature": COOL})


# The presets of docs/family.md, all trained at COOL; `opd` is `single_step_cool`
FAMILY = {
    "minillm_cool": _family("MiniLLM (the paper's)", "minillm"),
    "opd_sampled_cool": _family("OPD, sampled", "opd_sampled"),
    "iw_opd_cool": _family("IW-OPD", "iw_opd"),
    "prefix_opd_cool": _family("prefix OPD (8 tokens, all after half of the updates)", "opd", **_PREFIX),
    "forward_kl_cool": _family("forward KL", "forward_kl"),
    "mixed_kl_cool": _family("mixed KL", "mixed_kl"),
    "gkd_cool": _family("GKD", "gkd"),
    "distillm_cool": _family("DistiLLM, skewed reverse KL", "distillm"),
    "distillm_forward_cool": _family("DistiLLM, skewed forward KL", "distillm_forward"),
    "skd_cool": _family("SKD", "skd"),
    "entropy_aware_cool": _family("EOPD", "entropy_aware"),
    "trust_region_cool": _family("TrOPD's divergence", "trust_region"),
    "tip_cool": _family("TIP", "tip"),
}
# The rows of the main table that the family is compared with
FAMILY_RIVALS = ("sft", "distillation_cool", "single_step_cool", "low_variance_cool")
METHODS = MAIN | FAMILY | {name: method for name, method in ABLATIONS.items() if name not in SAME_AS}
