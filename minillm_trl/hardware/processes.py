"""The processes of a launch: their device, and whether they are connected."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..errors import UserError

# Number of processes, as launchers export it: torchrun and accelerate the first, MPI launchers the others
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_on_cpu() -> bool:
    """Return whether a launcher started this process for a CPU, by its configuration or without an accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (
        "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    )


def choose_device(args: TrainingArguments) -> None:
    """Set `use_cpu` in a process that was started for a CPU; call this before [`choose_precision`].

    Otherwise accelerate looks for GPUs, finds none, and treats each process as the only one.
    """
    args.use_cpu = args.use_cpu or launched_on_cpu()


def check_processes() -> None:
    """Check that this process is connected to all processes of its launch.

    Raises:
        ValueError: if it is not. Every process would do all the work, in the same folder.
    """
    name = next((name for name in _SIZES if name in os.environ), None)
    known = PartialState().num_processes
    if name is None or int(os.environ[name]) == known:
        return
    raise UserError(
        f"{name}={os.environ[name]} processes were started, but this one is connected to {known - 1} others: each "
        "would do all the work, in the same folder. On CPUs set use_cpu=True (accelerate: use_cpu: true). On GPUs "
        f"start one process for each GPU that torch finds. To run this process alone, unset {name}."
    )


def count_local_processes(number: int) -> int:
    """Return the number of processes on this machine, of `number` processes in all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", number))


def connected_state() -> PartialState:
    """Return the process state for a command without training arguments, checked by [`check_processes`]."""
    state = PartialState(cpu=launched_on_cpu())
    check_processes()
    return state
