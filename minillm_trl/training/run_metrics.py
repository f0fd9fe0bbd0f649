"""`RunMetrics`: metrics averaged over the tokens and completions of all processes since the last log."""

from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator

from .logged_metrics import Totals, median_and_max, metric_means


class RunMetrics:
    """Collect metrics of micro-batches, and average them when they are logged.

    A metric is a sum over all tokens or completions since the last log, divided by their number. Its value does not
    depend on their split into micro-batches and processes. The same holds for the evaluation loss. A metric's mode is
    "train" or "eval".

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._totals: dict[str, dict[tuple[str, ...], list[torch.Tensor]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        # single values of completions, for medians
        self._values: dict[str, dict[str, list[torch.Tensor]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        self._eval_loss: list[torch.Tensor] = []  # summed losses, and the number of their terms

    def add(self, mode: str, totals: Totals) -> None:
        """Add the totals of a micro-batch."""
        values = totals.values
        if mode == "train":  # NaN would break the means, and its step is skipped anyway
            values = torch.where(values.isfinite().all(), values, 0.0)
        self._totals[mode][tuple(totals.names)].append(self.accelerator.gather(values[None]))

    def add_values(self, mode: str, name: str, values: torch.Tensor) -> None:
        """Add a value for each completion of a micro-batch, `(B,)` with the same B on all processes.

        NaN marks a completion that does not count.
        """
        self._values[mode][name].append(self.accelerator.gather(values.detach().double()))

    def take(self, mode: str) -> list[tuple[str, float]]:
        """Return the metrics since the last call: median and maximum of the values, means from the totals."""
        metrics = [
            (f"{name}_{measure}", value)
            for name, gathered in self._values[mode].items()
            for measure, value in median_and_max(torch.cat(gathered)).items()
        ]
        for names, gathered in self._totals[mode].items():
            metrics += metric_means(list(names), torch.cat(gathered)).items()
        self._values[mode].clear()
        self._totals[mode].clear()
        return metrics

    def add_eval_loss(self, total: torch.Tensor, count: torch.Tensor | int) -> None:
        """Add the summed loss of an evaluation batch on this process, and the number of its tokens or sequences."""
        count = torch.as_tensor(count, device=total.device)
        self._eval_loss.append(torch.stack([total.detach().double(), count]))

    def begin_evaluation(self) -> None:
        """Drop the losses of earlier batches in evaluation mode."""
        self._eval_loss.clear()

    def eval_loss(self) -> float | None:
        """Return the mean loss of the evaluation over all tokens (or sequences); None without a loss."""
        if not self._eval_loss:
            return None
        total, count = self.accelerator.reduce(sum(self._eval_loss), reduction="sum").tolist()
        return total / max(count, 1.0)

    # Resuming

    def reset(self) -> None:
        """Drop what was not logged of the training."""
        self._totals["train"].clear()
        self._values["train"].clear()

    def state(self) -> dict[str, Any]:
        """Return the totals and values of the training since the last log."""
        return {
            "totals": [(list(names), torch.cat(parts).cpu()) for names, parts in self._totals["train"].items()],
            "values": {name: torch.cat(parts).cpu() for name, parts in self._values["train"].items()},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue with totals and values that [`state`] returned; some older checkpoints have none."""
        for names, parts in saved.get("totals", []):
            self._totals["train"][tuple(names)] = [parts.to(self.accelerator.device)]
        for name, values in saved.get("values", {}).items():
            self._values["train"][name] = [values.to(self.accelerator.device)]
