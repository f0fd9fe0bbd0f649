"""The processes of a launch: on which device they run, and whether they know about each other."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..errors import UserError

# What launchers tell their processes: torchrun and accelerate the first, those of MPI the others
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_on_cpu() -> bool:
    """Whether a launcher started this process for a CPU: its configuration says so, or torch has nothing else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (
        "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    )


def choose_device(args: TrainingArguments) -> None:
    """Set `use_cpu` in a process that was started for a CPU; call it before [`choose_precision`].

    Without it accelerate looks for GPUs, finds none, and takes each process for the only one.
    """
    args.use_cpu = args.use_cpu or launched_on_cpu()


def check_processes() -> None:
    """Check that this process knows about all processes of its launch.

    Raises:
        ValueError: if it does not. Each would do the whole work, in the same folder.
    """
    name = next((name for name in _SIZES if name in os.environ), None)
    known = PartialState().num_processes
    if name is None or int(os.environ[name]) == known:
        return
    raise UserError(
        f"{name}={os.environ[name]} processes were started, but this one is connected to {known - 1} others: each "
        "would do the whole work, in the same folder. On CPUs set use_cpu=True (accelerate: use_cpu: true). With GPUs "
        f"start one process for each that torch can use. To run this process alone, unset {name}."
    )


def connected_state() -> PartialState:
    """The state of the processes of a command that has no training arguments, checked by [`check_processes`]."""
    state = PartialState(cpu=launched_on_cpu())
    check_processes()
    return state
