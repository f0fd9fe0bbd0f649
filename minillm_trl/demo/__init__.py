"""The demo: a teacher from scratch, a much smaller student, MiniLLM, a control, a report; real data, in minutes.

`pipeline` runs the stages in order, `models` and `training` make the two models, `report` writes the page, and
`settings` has sizes and rates.
"""

from .models import build_model, train_tokenizer
from .pipeline import run_demo, train_pair
from .settings import DemoSettings, Shape

__all__ = ["DemoSettings", "Shape", "build_model", "run_demo", "train_pair", "train_tokenizer"]
