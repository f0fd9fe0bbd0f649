"""MiniLLM: on-policy distillation of large language models (arXiv 2306.08543) as a trainer on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .training.trl_version import check_trl_version

__version__ = "0.1.0"

_EXPORTS = {
    "DegenerationWatch": ".monitoring.degeneration_watch",
    "MiniLLMConfig": ".config",
    "MiniLLMTrainer": ".trainer",
    "TeacherMixedLogitsProcessor": ".rollouts.logits_processor",
    "objectives": ".objectives",
}
__all__ = [
    "DegenerationWatch",
    "MiniLLMConfig",
    "MiniLLMTrainer",
    "TeacherMixedLogitsProcessor",
    "__version__",
    "objectives",
]

check_trl_version()

if TYPE_CHECKING:
    from . import objectives
    from .config import MiniLLMConfig
    from .monitoring.degeneration_watch import DegenerationWatch
    from .rollouts.logits_processor import TeacherMixedLogitsProcessor
    from .trainer import MiniLLMTrainer


def __getattr__(name: str) -> Any:
    # torch and trl take seconds to import, which `minillm-trl --help` need not wait for
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_EXPORTS[name], __name__)
    return module if name == "objectives" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
