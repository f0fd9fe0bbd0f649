"""Hyperparameters of optimizer and schedule: a resumed run uses its current ones, not the checkpoint's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Groups = list[dict[str, Any]]

_PLAIN = bool | int | float | str | None
_BASE_RATE = "initial_lr"  # under this name a schedule stores it in the parameter groups
_RATES = (_BASE_RATE, "lr")
# For checkpoints without settings, only these entries are compared; others may be part of an optimizer's state
_COMPARED = (_BASE_RATE, "weight_decay", "betas", "eps", "momentum")


def read_groups(optimizer: torch.optim.Optimizer) -> Groups:
    """Return the entries of each parameter group that JSON can hold.

    Before its first step, these are an optimizer's hyperparameters. With a schedule, `initial_lr` is the base rate.
    """
    return [_plain_entries(group) for group in optimizer.param_groups]


def take_over(
    optimizer: torch.optim.Optimizer, scheduler: Any, given: Groups, before: Groups | None
) -> list[tuple[str, Any, Any]]:
    """Set the current hyperparameters in an optimizer and a schedule that were loaded from a checkpoint.

    An entry with the same value as `before` stays as loaded, since some optimizers keep their state in these entries.
    The schedule stays at its step, with its current base rate and form.

    Args:
        optimizer ([`~torch.optim.Optimizer`]): optimizer with the checkpoint's groups.
        scheduler: its schedule, at the checkpoint's step.
        given, before (`list[dict]`): [`read_groups`] of the fresh optimizer, now and at the start of the checkpoint's
            run. `before=None` uses the checkpoint's groups.

    Returns:
        `list[tuple]`: name, old value and new value of each change.
    """
    if before is None:
        before = [{name: group[name] for name in _COMPARED if name in group} for group in read_groups(optimizer)]
    for index, (group, new, old) in enumerate(zip(optimizer.param_groups, given, before, strict=True)):
        for name in _changed(new, old):
            if name in _RATES:
                _set_base_rate(group, scheduler, index, old[name], new[name])
            else:
                group[name] = tuple(new[name]) if isinstance(new[name], list) else new[name]
    _follow_schedule(optimizer, scheduler)
    return list_changes(given, before)


def list_changes(given: Groups, before: Groups) -> list[tuple[str, Any, Any]]:
    """Return name, old value and new value of each hyperparameter that has changed in any group."""
    changes = [
        ("lr" if name in _RATES else name, old[name], new[name])
        for new, old in zip(given, before, strict=True)
        for name in _changed(new, old)
    ]
    return sorted({str(change): change for change in changes}.values(), key=str)


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries that differ. With a schedule, compare its base rate, not the current rate."""
    left_out = _RATES[1] if _RATES[0] in new else None
    return [name for name in sorted(new.keys() & old.keys()) if name != left_out and new[name] != old[name]]


def kind_of(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, str]:
    """Return the classes of the optimizer and the schedule whose states a checkpoint holds."""
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    return {
        name: f"{type(part).__module__}.{type(part).__qualname__}"
        for name, part in (
            ("optimizer", inner),
            ("schedule", _unwrapped(scheduler)),
        )
    }


def _plain_entries(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, _PLAIN) or (
            isinstance(value, Sequence) and all(isinstance(number, _PLAIN) for number in value)
        ):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _set_base_rate(group: dict[str, Any], scheduler: Any, index: int, old: float, new: float) -> None:
    """Replace a base rate; the current rate keeps its ratio to the base rate."""
    if _BASE_RATE in group:
        group[_BASE_RATE] = new
    _set_rate(group, float(group["lr"]) / old * new if old else new)
    for schedule in _nested(scheduler):
        if index < len(getattr(schedule, "base_lrs", ())):
            schedule.base_lrs[index] = new


def _follow_schedule(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Recompute the rates of a schedule that is a function of its step, as its form may have changed."""
    scheduler = _unwrapped(scheduler)
    if not isinstance(scheduler, LambdaLR):
        return
    rates = [
        base * function(scheduler.last_epoch)
        for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _set_rate(group, rate)
    scheduler._last_lr = rates  # what is logged until its next step


def _set_rate(group: dict[str, Any], rate: float | torch.Tensor) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _unwrapped(scheduler: Any) -> Any:
    """Return the schedule inside the wrapper of accelerate."""
    inner = getattr(scheduler, "scheduler", None)
    return scheduler if inner is None else inner


def _nested(scheduler: Any) -> Iterator[LRScheduler]:
    """Yield a schedule and the schedules that it consists of."""
    scheduler = _unwrapped(scheduler)
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)
