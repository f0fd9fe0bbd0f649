"""Show one progress bar per training stage, and measure the seconds its updates take."""

import time

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class StageProgress(TrainerCallback):
    """Show a bar with the remaining time and the latest values of a few metrics."""

    def __init__(self, title: str, shown: dict[str, str]):
        self.title = title
        self.shown = shown  # metric -> label
        self.values: dict[str, str] = {}
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"  {self.title}", unit=" updates")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        logs = logs or {}
        self.values |= {label: f"{logs[name]:.3g}" for name, label in self.shown.items() if name in logs}
        if self.bar is not None:
            self.bar.set_postfix(self.values, refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()


class UpdateTimer(TrainerCallback, ExportableState):
    """Measure the seconds of updates, with sampling and scoring but without evaluation and saving. Resumable."""

    def __init__(self):
        self.seconds = 0.0
        self._started = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.seconds += time.perf_counter() - self._started

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds}}
