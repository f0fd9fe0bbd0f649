"""What MiniLLM is compared with: fine-tuning, word-level KD (`kd`) and sequence-level KD (`seqkd`)."""

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
    # the options of a command need a configuration, and not TRL's trainers, which take seconds to import
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
