"""An optimizer's hyperparameters and its schedule's base rates, of which a resumed run takes those of now."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Groups = list[dict[str, Any]]

_PLAIN = bool | int | float | str | None
_BASE_RATE = "initial_lr"  # as a schedule notes it in the groups
_RATES = (_BASE_RATE, "lr")
# What a checkpoint's own groups are compared by where it has no settings; other entries may be an optimizer's state
_COMPARED = (_BASE_RATE, "weight_decay", "betas", "eps", "momentum")


def read_groups(optimizer: torch.optim.Optimizer) -> Groups:
    """The plain entries of each parameter group, as JSON has them; of an optimizer that has not stepped yet, they are
    its hyperparameters. The rate of a schedule is its base rate."""
    return [_plain_entries(group) for group in optimizer.param_groups]


def take_over(
    optimizer: torch.optim.Optimizer, scheduler: Any, given: Groups, before: Groups | None
) -> list[tuple[str, Any, Any]]:
    """After a checkpoint was loaded: give an optimizer and its schedule the hyperparameters that are given now.

    An entry that is given as it was `before` stays as loaded, as some optimizers keep a state among them. The schedule
    stays at its step, with the base rate and the form of now.

    Args:
        optimizer ([`~torch.optim.Optimizer`]): with the groups of the checkpoint.
        scheduler: its schedule, at the checkpoint's step.
        given, before (`list[dict]`): [`read_groups`] of the fresh optimizer now and when the checkpoint's run began;
            `before=None` stands for the groups of the checkpoint.

    Returns:
        `list[tuple]`: name, old and new value of what is different.
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
    """Name, old and new value of what is given otherwise than before, in any group."""
    changes = [
        ("lr" if name in _RATES else name, old[name], new[name])
        for new, old in zip(given, before, strict=True)
        for name in _changed(new, old)
    ]
    return sorted({str(change): change for change in changes}.values(), key=str)


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Names of the entries that differ between both; of the rates, the base rate where a schedule has noted one."""
    left_out = _RATES[1] if _RATES[0] in new else None
    return [name for name in sorted(new.keys() & old.keys()) if name != left_out and new[name] != old[name]]


def kind_of(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, str]:
    """The classes whose states a checkpoint holds."""
    inner = optimizer
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
    """Let the rate keep its share of the base rate; a schedule that computes it from its step does so again."""
    if _BASE_RATE in group:
        group[_BASE_RATE] = new
    rate = float(group["lr"]) / old * new if old else new
    _set_rate(group, rate)
    for schedule in _nested(scheduler):
        if index < len(getattr(schedule, "base_lrs", ())):
            schedule.base_lrs[index] = new


def _follow_schedule(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Set the rates of a schedule that is a function of its step: it may have another form than it had."""
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


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _unwrapped(scheduler: Any) -> Any:
    """What is inside the wrapper that accelerate makes."""
    inner = getattr(scheduler, "scheduler", None)
    return scheduler if inner is None else inner


def _nested(scheduler: Any) -> Iterator[LRScheduler]:
    """A schedule, and those that it puts one after the other."""
    scheduler = _unwrapped(scheduler)
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)
