"""`StepGuard`: skips optimizer steps with NaN or infinite numbers, on all processes together."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from transformers.utils import logging

from ..hardware.precision import zero_loss_scaler

logger = logging.get_logger(__name__)

_REMEDY = (
    "Check the teacher in float32 on the prompts named above; lower learning_rate; instead of float16, use bf16=True "
    "if the device supports it, or models whose activations fit in float16."
)


class StepGuard:
    """Skip an optimizer step on all processes if any of them has a number that is not finite; count and explain it.

    A skipped step changes neither the weights nor the optimizer's state nor the loss scale of float16. A trainer
    passes each loss through [`check_loss`], and calls [`agree_on_step`] before each optimizer step.

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        args ([`~transformers.TrainingArguments`]): with `max_nonfinite_steps`, the number of skipped steps in a row
            that ends the run.
    """

    def __init__(self, accelerator: Accelerator, args: Any):
        self.accelerator = accelerator
        self.args = args
        self.skipped = 0  # steps of this run
        self.skipped_in_row = 0
        self.faults: list[str] = []  # explanations of this process since the last optimizer step
        self._scaler_before: dict[str, Any] = {}

    def reset(self) -> None:
        """Start a run."""
        self.faults.clear()
        self.skipped = self.skipped_in_row = 0

    def state(self) -> dict[str, Any]:
        """Return the counts to resume with."""
        return {"nonfinite_steps": (self.skipped, self.skipped_in_row)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Resume with the counts that [`state`] returned."""
        self.skipped, self.skipped_in_row = saved["nonfinite_steps"]

    def check_loss(self, loss: torch.Tensor, explain: Callable[[float], str], engine: Any = None) -> torch.Tensor:
        """Note the loss of a training micro-batch if it is not finite, and return NaN for the rest of a faulty step.

        DeepSpeed steps within the backward pass and skips a step with a NaN gradient. The logged mean leaves out NaN.

        Args:
            loss (`torch.Tensor`): a scalar.
            explain (`Callable`): describes the micro-batch, given its loss.
            engine (*optional*): DeepSpeed's engine, if it wraps the model.
        """
        if engine is not None:
            self._scaler_before = dict(zero_loss_scaler(engine))
        if not self.faults and not loss.isfinite():
            self.faults.append(explain(loss.item()))
        return loss * torch.nan if self.faults else loss

    def agree_on_step(
        self,
        grad_norm: Any,
        step: int,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        engine: Any = None,
        stops: bool = False,
    ) -> bool:
        """Agree with all processes before an optimizer step on whether to skip it, and on whether to stop after it.

        Args:
            grad_norm (*optional*): norm of the step's gradient; None if DeepSpeed has none.
            step (`int`): optimizer steps so far.
            model, optimizer: what the step would change.
            engine (*optional*): DeepSpeed's engine, if it wraps the model.
            stops (`bool`): whether this process has to stop after the step.

        Returns:
            `bool`: whether any process has to stop.

        Raises:
            FloatingPointError: after `max_nonfinite_steps` skipped steps in a row, or if DeepSpeed took a faulty step.
        """
        scaler = self.accelerator.scaler
        scales = scaler is not None or self.args.fp16  # overflows are normal: they adapt the loss scale
        gradient_is_bad = not scales and grad_norm is not None and not torch.as_tensor(grad_norm).isfinite().item()
        if scaler is not None and scaler.get_scale() < 1.0:
            self.faults.append(f"the loss scale fell to {scaler.get_scale():.2g}: gradients overflow at any scale")
        faulty, gradient_is_bad, stops = self._on_any_process(bool(self.faults), gradient_is_bad, stops)
        if not (faulty or gradient_is_bad):
            self.skipped_in_row = 0
            return stops
        if faulty:
            explained, self.faults = gather_object(self.faults), []
        else:
            explained = [f"the gradient's norm is {float(grad_norm)}, while all losses are finite"]
        # DeepSpeed has stepped within the backward pass; its ZeRO optimizers skip a gradient that is not finite
        if engine is not None and not optimizer.step_was_skipped:
            raise FloatingPointError(f"Step {step} broke the weights: {explained[0]}. {_REMEDY}")
        self._count(step, explained)
        self._skip(model, engine)
        return stops

    def _on_any_process(self, *flags: bool) -> list[bool]:
        counts = self.accelerator.reduce(torch.tensor(flags, device=self.args.device).long(), reduction="sum")
        return counts.bool().tolist()

    def _count(self, step: int, explained: list[str]) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        logger.warning(f"Optimizer step {step} is skipped: {'; '.join(explained[:4])}.")
        if self.skipped_in_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self.skipped_in_row} optimizer steps in a row were skipped (max_nonfinite_steps), the last one, "
                f"{step}, because {explained[0]}. The weights are those before these steps. {_REMEDY}"
            )

    def _skip(self, model: torch.nn.Module, engine: Any) -> None:
        if self.accelerator.scaler is not None:
            # The scaler would take the NaN for an overflow and halve its scale. So reset its record of this step, and
            # call neither scaler nor optimizer.
            self.accelerator.scaler.update(self.accelerator.scaler.get_scale())
            self.accelerator.gradient_state._set_sync_gradients(False)
            return
        if engine is not None:
            zero_loss_scaler(engine).update(self._scaler_before)
        for parameter in model.parameters():  # optimizers skip weights without a gradient
            parameter.grad = None
