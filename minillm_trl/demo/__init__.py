"""The demo: a teacher from scratch, a much smaller student, MiniLLM, a control, a report; real data, in minutes."""

from .pipeline import run_demo, train_pair
from .settings import DemoSettings

__all__ = ["DemoSettings", "run_demo", "train_pair"]
