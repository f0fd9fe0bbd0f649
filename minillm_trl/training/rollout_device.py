"""`rollout_device`: the device of its own on which each process samples its rollouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..hardware.processes import count_local_processes
from ..models.init_kwargs import parsed_kwargs

if TYPE_CHECKING:
    from ..config import MiniLLMConfig


def check_rollout_device(args: "MiniLLMConfig") -> None:
    """Check `rollout_device` on any machine: its form, and the settings that it does not work with.

    Raises:
        UserError: with the field, its value and the fix.
    """
    name = args.rollout_device
    if name is None:
        return
    if not args.overlap_rollouts:
        raise UserError(
            f"rollout_device={name!r} needs overlap_rollouts=True: without it, one device would wait for the other. "
            "Set overlap_rollouts=True, or drop rollout_device."
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"rollout_device={name!r} is no device of torch. Name a type and an index, such as 'cuda:1'."
        ) from error
    has_indices = device.type not in ("cpu", "mps")
    if device.type == "meta" or has_indices != (device.index is not None):
        fix = f"such as '{device.type}:1'" if has_indices and device.type != "meta" else "or 'cpu'"
        raise UserError(f"rollout_device={name!r} does not name one device. Give a type and an index, {fix}.")
    if args.teacher_shares_base:
        raise UserError(
            f"rollout_device={name!r} and teacher_shares_base=True: the teacher's weights are those of the student on "
            "the device that trains. Set teacher_shares_base=False, or drop rollout_device."
        )


def rollout_device(args: "MiniLLMConfig") -> torch.device | None:
    """Return the device on which this process samples, or None if it is the one that trains.

    Process i of the N processes of a machine samples on the index of `rollout_device` plus i. All processes of a
    machine give the same answer on whether this works.

    Args:
        args ([`MiniLLMConfig`]): the settings, which know the process and the device that it trains on.

    Raises:
        UserError: if torch does not find the devices, or one of them trains.
    """
    if args.rollout_device is None:
        return None
    name, first, trains = args.rollout_device, torch.device(args.rollout_device), args.device.type
    if first.index is None:
        if first.type == trains:
            raise UserError(
                f"rollout_device={name!r}: the {name} trains. Name another device, or drop rollout_device."
            )
        _check_count(name, first.type, 1, count_devices(first.type))
        return first
    number = count_local_processes(args.world_size)
    if first.type == trains and first.index < number:
        used = _names(trains, 0, number)
        raise UserError(
            f"rollout_device={name!r}: the processes of this machine train on {used}. Set rollout_device="
            f"'{trains}:{number}', so that process i samples on {trains}:{number} + i."
        )
    _check_count(name, _names(first.type, first.index, number), first.index + number, count_devices(first.type))
    return torch.device(first.type, first.index + args.local_process_index)


def count_devices(kind: str) -> int:
    """Return the number of devices of a type that torch finds."""
    if kind == "cpu":
        return 1
    module = torch.get_device_module(kind)
    return module.device_count() if module.is_available() else 0


def _check_count(name: str, needed: str, least: int, found: int) -> None:
    if found < least:
        raise UserError(
            f"rollout_device={name!r} needs {needed}, but torch finds {found} devices of this type. Name another "
            "device, start fewer processes, or drop rollout_device."
        )


def _names(kind: str, first: int, number: int) -> str:
    last = first + number - 1
    return f"{kind}:{first}" if number == 1 else f"{kind}:{first} to {kind}:{last}"


@contextmanager
def training_on_one_device(args: "MiniLLMConfig") -> Iterator[None]:
    """Keep the trainer that is built in the block to one device, if another one is for rollouts.

    By default, transformers trains on all GPUs that a process without a launcher sees (`nn.DataParallel`), and TRL
    splits the models that it loads over them.

    Raises:
        UserError: see [`rollout_device`].
    """
    device = rollout_device(args)
    if device is None or device.type != args.device.type or args.n_gpu <= 1:
        yield
        return
    given = args.model_init_kwargs
    args._n_gpu = 1
    args.model_init_kwargs = {"device_map": None, **(parsed_kwargs(given) or {})}
    try:
        yield
    finally:
        args.model_init_kwargs = given


def check_placed(teacher: PreTrainedModel, device: torch.device, name: str | None) -> None:
    """Check that all of a teacher is on the device of the rollouts; quantised and split ones cannot be moved there.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): the teacher.
        device (`torch.device`): the device of this process.
        name (`str`): value of `rollout_device`.

    Raises:
        UserError: naming the device on which a weight is.
    """
    for weight in (*teacher.parameters(), *teacher.buffers()):
        if weight.device != device:
            raise UserError(
                f"rollout_device={name!r} needs the teacher on {device}, but a part of it is on {weight.device}, from "
                "where it cannot be moved: it is quantised, or split by its device_map. Pass its name or folder "
                "instead of a model, and drop device_map from teacher_model_init_kwargs."
            )
