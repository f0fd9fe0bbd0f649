"""`FiniteSteps`: a transformers `Trainer` that skips optimizer steps with NaN or infinite numbers."""

import threading
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..hardware.precision import zero_loss_scaler

logger = logging.get_logger(__name__)

_REMEDY = (
    "Check the teacher in float32 on the prompts named above; lower learning_rate; instead of float16, use bf16=True "
    "if the device supports it, or models whose activations fit in float16."
)


class FiniteSteps(Trainer):
    """Skip an optimizer step on all processes if any of them has a number that is not finite; count and explain it.

    A skipped step changes neither the weights nor the optimizer's state nor the loss scale of float16.
    `args.max_nonfinite_steps` skipped steps in a row end the run.
    """

    # transformers declares these as optional or more general; its constructor, and training, set them to these types
    args: Any  # its arguments, with `max_nonfinite_steps`
    model: PreTrainedModel
    optimizer: AcceleratedOptimizer

    _sigterm: threading.Event  # processes agree on SIGTERM when they agree on a step

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sigterm_received = False
        self._faults: list[str] = []  # explanations of this process since the last optimizer step
        self._nonfinite_steps = 0
        self._nonfinite_in_row = 0
        self._scaler_before: dict[str, Any] = {}

    def _forget_last_run(self) -> None:
        """Reset the state that an earlier call of `train()` left; restoring a checkpoint comes later."""
        self._faults.clear()
        self._nonfinite_steps = self._nonfinite_in_row = 0

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as TRL does, and note a loss that is not finite, so that the optimizer step is skipped."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            self._check_loss(result[0], inputs)
            return result
        return self._check_loss(result, inputs)

    def _check_loss(self, loss: torch.Tensor, inputs: Any) -> torch.Tensor:
        """In training, note a loss that is not finite, and return NaN for the rest of a faulty step.

        DeepSpeed steps within the backward pass and skips a step with a NaN gradient. The logged mean leaves out NaN.
        """
        if not self.model.training:
            return loss
        if self.is_deepspeed_enabled:
            self._scaler_before = dict(zero_loss_scaler(self.model_wrapped))
        if not self._faults and not loss.isfinite():
            self._faults.append(self._explain_loss(loss.item(), inputs))
        return loss * torch.nan if self._faults else loss

    def _explain_loss(self, loss: float, inputs: Any) -> str:
        """Describe a micro-batch whose loss is not finite."""
        tokenizer: Any = self.processing_class
        text = tokenizer.decode(inputs["input_ids"][0][:32])
        return f"the loss is {loss} in a micro-batch whose first row begins with {text!r}"

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._agree_on_step(norm)
        return norm

    def _agree_on_step(self, grad_norm: Any) -> None:
        """Agree before an optimizer step on whether all processes skip it, and on whether one received SIGTERM."""
        scaler = self.accelerator.scaler
        scales = scaler is not None or self.args.fp16  # overflows are normal: they adapt the loss scale
        gradient_is_bad = not scales and grad_norm is not None and not torch.as_tensor(grad_norm).isfinite().item()
        if scaler is not None and scaler.get_scale() < 1.0:
            self._faults.append(f"the loss scale fell to {scaler.get_scale():.2g}: gradients overflow at any scale")
        flags = bool(self._faults), gradient_is_bad, self._sigterm.is_set()
        faulty, gradient_is_bad, self._sigterm_received = self._on_any_process(*flags)
        if not (faulty or gradient_is_bad):
            self._nonfinite_in_row = 0
            return
        explained = [f"the gradient's norm is {float(grad_norm)}, while all losses are finite"]
        if faulty:
            explained, self._faults = gather_object(self._faults), []
        # DeepSpeed has stepped within the backward pass; its ZeRO optimizers skip a gradient that is not finite
        if self.is_deepspeed_enabled and not self.optimizer.step_was_skipped:
            raise FloatingPointError(f"Step {self.state.global_step} broke the weights: {explained[0]}. {_REMEDY}")
        self._skip_step(explained)

    def _on_any_process(self, *flags: bool) -> list[bool]:
        counts = self.accelerator.reduce(torch.tensor(flags, device=self.args.device).long(), reduction="sum")
        return counts.bool().tolist()

    def _skip_step(self, explained: list[str]) -> None:
        self._nonfinite_steps += 1
        self._nonfinite_in_row += 1
        step = self.state.global_step
        logger.warning(f"Optimizer step {step} is skipped: {'; '.join(explained[:4])}.")
        if self._nonfinite_in_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self._nonfinite_in_row} optimizer steps in a row were skipped (max_nonfinite_steps), the last one, "
                f"{step}, because {explained[0]}. The weights are those before these steps. {_REMEDY}"
            )
        if self.accelerator.scaler is not None:
            # The scaler would take the NaN for an overflow and halve its scale. So reset its record of this step, and
            # call neither scaler nor optimizer.
            self.accelerator.scaler.update(self.accelerator.scaler.get_scale())
            self.accelerator.gradient_state._set_sync_gradients(False)
            return
        if self.is_deepspeed_enabled:
            zero_loss_scaler(self.model_wrapped).update(self._scaler_before)
        for parameter in self.model.parameters():  # optimizers skip weights without a gradient
            parameter.grad = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of steps skipped so far."""
        if "loss" in logs:
            logs = {**logs, "nonfinite_steps": float(self._nonfinite_steps)}
        super().log(logs, start_time)
