"""Mixed precision: which one, what stays in float32, and the steps that overflow in float16."""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ..errors import UserError


def choose_precision(args: TrainingArguments) -> None:
    """Set `fp16` and `bf16` where neither is true.

    What `accelerate launch` was told is what accelerate will do. Without it, and unless `bf16` is False, it is
    bfloat16 on CUDA devices that have it (compute capability 8.0).

    Raises:
        UserError: for `bf16` without a device for it, unless `use_cpu` says that the CPU is meant.
    """
    if args.fp16 or args.bf16:
        _check_bf16(args)
        return
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched in ("fp16", "bf16"):
        args.fp16, args.bf16 = launched == "fp16", launched == "bf16"
    elif args.bf16 is None:
        args.bf16 = not args.use_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check_bf16(args: TrainingArguments) -> None:
    if args.bf16 and not args.use_cpu and not torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        raise UserError(
            "bf16=True: torch can use no GPU here. Set use_cpu=True to train in bfloat16 on the CPU, or bf16=False."
        )


def half_precision(accelerator: Accelerator) -> torch.dtype | None:
    """The dtype of products under mixed precision; None in float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)


def keep_adapters_in_float32(model: PreTrainedModel) -> None:
    """Undo GRPOTrainer's cast of the adapters of quantised models to bfloat16, which a V100 does not have; and with
    eight bits of precision a small update of a weight is lost anywhere. Other models are left as they are."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def fsdp_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights are gathered in half precision and gradients reduced in float32.

    Accelerate's policy would also cast what the modules return: the residual stream, which overflows float16 in some
    models, and the losses.
    """
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
    )


def configure_wrappers(accelerator: Accelerator) -> None:
    """How FSDP and DDP are to wrap the model that is trained; call it before they do.

    FSDP follows [`fsdp_policy`] in half precision. DDP reduces gradients where they lie: by default it keeps a second
    copy of them, four bytes a weight.
    """
    plugin, half = getattr(accelerator.state, "fsdp_plugin", None), half_precision(accelerator)
    if plugin is not None and half is not None:
        plugin.mixed_precision_policy = fsdp_policy(half)
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True


def zero_loss_scaler(engine: Any) -> dict[str, Any]:
    """The numbers of the loss scaler of DeepSpeed's ZeRO optimizers, to read and to write; empty for other optimizers.

    DeepSpeed takes a step within the backward pass, where its scaler takes all that is not finite for an overflow.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {} if scaler is None else vars(scaler)


class OverflowCounter(TrainerCallback):
    """Counts the optimizer steps that were skipped because a gradient overflowed in float16.

    That is how the loss scale finds its size, so a few at the start and one now and then are no fault.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
        skipped_otherwise (`Callable`, *optional*): whether the step was skipped for another reason, which is counted
            elsewhere.
    """

    def __init__(self, accelerator: Any, skipped_otherwise: Callable[[], bool] = lambda: False):
        self.accelerator = accelerator
        self._skipped_otherwise = skipped_otherwise
        self.skipped_steps = 0
        self._scale = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """A resumed run goes on counting."""
        if self.accelerator.scaler is not None:
            self._scale = self.accelerator.scaler.get_scale()
        logged = [int(each["fp16/skipped_steps"]) for each in state.log_history if "fp16/skipped_steps" in each]
        self.skipped_steps = logged[-1] if logged else 0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Called after each step, taken or skipped: then the scale has fallen.

        accelerate takes each step of a fused optimizer for taken, which skips by itself.
        """
        if self.accelerator.scaler is None:  # DeepSpeed
            self.skipped_steps += self.accelerator.optimizer_step_was_skipped and not self._skipped_otherwise()
            return
        before, self._scale = self._scale, self.accelerator.scaler.get_scale()
        self.skipped_steps += self._scale < before

    def metrics(self, engine: Any) -> dict[str, float]:
        """`fp16/skipped_steps` and `fp16/loss_scale`, from accelerate's scaler or that of a DeepSpeed `engine`."""
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else getattr(engine.optimizer, "cur_scale", None)
        metrics = {"fp16/skipped_steps": float(self.skipped_steps)}
        return metrics if scale is None else {**metrics, "fp16/loss_scale": float(scale)}
