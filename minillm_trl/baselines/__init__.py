"""What MiniLLM is compared with: fine-tuning, word-level KD (`kd`) and sequence-level KD (`seqkd`)."""

from .fine_tuning import FineTuningConfig, FineTuningTrainer
from .kd import KDConfig, KDTrainer
from .seqkd import SeqKDConfig

__all__ = ["FineTuningConfig", "FineTuningTrainer", "KDConfig", "KDTrainer", "SeqKDConfig"]
