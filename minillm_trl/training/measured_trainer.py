"""`MeasuredTrainer`: a `ReliableTrainer` with metrics averaged over the tokens and completions of all processes."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from .evaluation_rows import FilledDataset, FilledStream, Row
from .logged_metrics import Totals, median_and_max, metric_means
from .reliable_trainer import ReliableTrainer


class MeasuredTrainer(ReliableTrainer):
    """Compute and log the metrics that the trainers of this package share.

    - A metric is a sum over all tokens or completions since the last log, divided by their number. Its value does not
      depend on their split into micro-batches and processes. The same holds for the evaluation loss.
    - In an evaluation every row counts once. If the processes need more rows, [`_blank`] makes fillers.
    - With several evaluation datasets, the metrics have the dataset's name.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._totals: dict[str, dict[tuple[str, ...], list[torch.Tensor]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        # single values of completions, for medians
        self._values: dict[str, dict[str, list[torch.Tensor]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        self._eval_loss: list[torch.Tensor] = []  # summed losses, and the number of their terms

    _blank: Callable[[Row], Row]

    # Evaluation

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader:
        processes = self.accelerator.num_processes
        if not kwargs.get("is_training", False) and processes > 1:
            multiple = batch_size if self.args.accelerator_config.split_batches else batch_size * processes
            if isinstance(dataset, torch.utils.data.IterableDataset):
                loading = self.accelerator.dataloader_config
                if (
                    loading.dispatch_batches is None
                ):  # the default for streams is True, which fails if batch widths differ
                    loading.dispatch_batches = False
                dataset = FilledStream(dataset, multiple, self._blank)
            elif not self.args.dataloader_drop_last:
                dataset = FilledDataset(
                    dataset, multiple // math.gcd(multiple, self._repeats_in_evaluation), self._blank
                )
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    @property
    def _repeats_in_evaluation(self) -> int:
        """Return how often the sampler of an evaluation yields each row of a dataset."""
        return 1

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does, but average the loss over all tokens (or sequences), not over batches."""
        self._eval_loss.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_loss:
            total, count = self.accelerator.reduce(sum(self._eval_loss), reduction="sum").tolist()
            assert output.metrics is not None  # a dict since transformers made it
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1.0)
        if isinstance(dataloader.dataset, FilledDataset):
            output = output._replace(num_samples=len(dataloader.dataset.rows))
        return output

    def _add_eval_loss(self, total: torch.Tensor, count: torch.Tensor | int) -> None:
        """Add the summed loss of an evaluation batch on this process, and the number of its tokens or sequences."""
        count = torch.as_tensor(count, device=total.device)
        self._eval_loss.append(torch.stack([total.detach().double(), count.double()]))

    # Metrics

    def _log_totals(self, totals: Totals) -> None:
        mode, values = "train" if self.model.training else "eval", totals.values
        if self.model.training:  # NaN would break the means, and its step is skipped anyway
            values = torch.where(values.isfinite().all(), values, 0.0)
        self._totals[mode][tuple(totals.names)].append(self.accelerator.gather(values[None]))

    def _log_values(self, name: str, values: torch.Tensor) -> None:
        """Add a value for each completion of a micro-batch, `(B,)` with the same B on all processes.

        NaN marks a completion that does not count.
        """
        mode = "train" if self.model.training else "eval"
        self._values[mode][name].append(self.accelerator.gather(values.detach().double()))

    def _log_means(self) -> None:
        """Compute the metrics since the last log: means from the totals, median and maximum of the values."""
        mode = "train" if self.model.training else "eval"
        for name, gathered in self._values[mode].items():
            for measure, value in median_and_max(torch.cat(gathered)).items():
                self._metrics[mode][f"{name}_{measure}"].append(value)
        self._values[mode].clear()
        for names, gathered in self._totals[mode].items():
            for name, value in metric_means(list(names), torch.cat(gathered)).items():
                self._metrics[mode][name].append(value)
        self._totals[mode].clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; with several evaluation datasets add the dataset's name to TRL's metrics, which lack it."""
        self._log_means()
        loss = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), "eval_loss")
        name = loss.removeprefix("eval_").removesuffix("loss")  # "" for a single dataset
        metrics = self._metrics["eval"]
        for key in list(metrics) if name else ():
            metrics[name + key] = metrics.pop(key)
        super().log(logs, start_time)

    # Resuming

    def _forget_last_run(self) -> None:
        super()._forget_last_run()
        self._totals["train"].clear()
        self._metrics["train"].clear()

    def _run_state(self) -> dict[str, Any]:
        totals = [(list(names), torch.cat(parts).cpu()) for names, parts in self._totals["train"].items()]
        values = {name: torch.cat(parts).cpu() for name, parts in self._values["train"].items()}
        return {**super()._run_state(), "totals": totals, "values": values}

    def _restore_run(self, state: TrainerState, control: TrainerControl) -> None:
        super()._restore_run(state, control)
        if self._resumed_state is not None:
            for names, parts in self._resumed_state.get("totals", []):  # older checkpoints of fine-tuning have none
                self._totals["train"][tuple(names)] = [parts.to(self.accelerator.device)]
            for name, values in self._resumed_state.get("values", {}).items():  # older checkpoints have none
                self._values["train"][name] = [values.to(self.accelerator.device)]
