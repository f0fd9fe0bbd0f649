"""The baselines of the paper: fine-tuning (`sft`), word-level KD (`kd`) and sequence-level KD (`seqkd`).

- `configs`: the configurations, importable without a trainer.
- `fine_tuning`, `training_data`: TRL's `SFTTrainer` with sampled evaluation, and the data that it encodes.
- `kd`: the forward KL to the teacher on the data.
- `seqkd`, `teacher_data`: the teacher's completions, sampled and collected in a folder, to fine-tune on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["FineTuningConfig", "FineTuningTrainer", "KDConfig", "KDTrainer", "SeqKDConfig"]

_EXPORTS = {
    "FineTuningConfig": ".configs",
    "FineTuningTrainer": ".fine_tuning",
    "KDConfig": ".configs",
    "KDTrainer": ".kd",
    "SeqKDConfig": ".configs",
}

if TYPE_CHECKING:
    from .configs import FineTuningConfig, KDConfig, SeqKDConfig
    from .fine_tuning import FineTuningTrainer
    from .kd import KDTrainer


def __getattr__(name: str) -> Any:
    # command-line options need only a configuration; importing TRL's trainers takes seconds
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
