"""The demo: a teacher from scratch, a much smaller student, MiniLLM, a control, and a report, on real data in minutes."""

from .pipeline import run_demo
from .settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
