"""Hyperparameters of optimizers and schedules: what is read, which changes count, and what is set in their place."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR

from minillm_trl.training.hyperparameters import kind_of, list_changes, read_groups, take_over


def optimizer(*groups: dict, kind: type = torch.optim.SGD) -> torch.optim.Optimizer:
    return kind([{"params": [torch.nn.Parameter(torch.ones(2))], **group} for group in groups], lr=0.1)


class TestRead:
    def test_plain_entries_of_each_group(self):
        """Tensors of one number are numbers, and tuples lists, as in JSON; other entries are left out."""
        found = optimizer({"lr": 0.5, "extra": torch.tensor(2.0)}, {"weight_decay": 0.3})
        found.param_groups[0] |= {"one": torch.tensor([3]), "two": torch.ones(2), "pair": (0.9, 0.99)}
        found.param_groups[0] |= {"list": [1, None, "a"], "mixed": [1, torch.ones(1)], "object": object()}
        first, second = read_groups(found)
        assert {name: first[name] for name in ("lr", "extra", "one", "pair", "list")} == {
            **{"lr": 0.5, "extra": 2.0, "one": 3, "pair": [0.9, 0.99], "list": [1, None, "a"]}
        }
        assert isinstance(first["pair"], list)
        assert not {"params", "two", "mixed", "object"} & first.keys()
        assert (second["lr"], second["weight_decay"], second["nesterov"]) == (0.1, 0.3, False)


class TestChanges:
    def test_each_change_is_listed_once_for_all_groups(self):
        before = [{"initial_lr": 0.1, "lr": 0.05, "betas": [0.9, 0.99], "eps": 1.0, "old": 1}] * 2
        now = [
            {"initial_lr": 0.2, "lr": 0.05, "betas": [0.8, 0.99], "eps": 1.0, "new": 1},
            {"initial_lr": 0.3, "lr": 0.05, "betas": [0.8, 0.99], "eps": 2.0},
        ]
        assert list_changes(now, before) == [
            ("betas", [0.9, 0.99], [0.8, 0.99]),
            ("eps", 1.0, 2.0),
            ("lr", 0.1, 0.2),
            ("lr", 0.1, 0.3),
        ]

    def test_values_of_other_types_are_listed_too(self):
        before = [{"momentum": None}, {"momentum": 0.5}, {"momentum": "a"}]
        assert list_changes([{"momentum": 0.1}] * 3, before) == [
            ("momentum", "a", 0.1),
            ("momentum", 0.5, 0.1),
            ("momentum", None, 0.1),
        ]

    def test_rate_counts_without_a_schedule_alone(self):
        """With one, the current rate is a matter of its step."""
        scheduled = [{"initial_lr": 0.1, "lr": 0.1}], [{"initial_lr": 0.1, "lr": 0.02}]
        assert list_changes(*scheduled) == []
        assert list_changes([{"lr": 0.1}], [{"lr": 0.02}]) == [("lr", 0.02, 0.1)]
        assert list_changes([{"initial_lr": 0.1, "lr": 0.0}], [{"lr": 0.1}]) == []  # a warm-up begins with 0

    def test_other_number_of_groups_is_no_comparison(self):
        with pytest.raises(ValueError, match="argument"):
            list_changes([{"lr": 0.1}], [{"lr": 0.1}, {"lr": 0.1}])


class TestTakeOver:
    def test_groups_have_their_own_values(self):
        loaded = optimizer({"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.2, "weight_decay": 0.5}, kind=torch.optim.AdamW)
        before = read_groups(loaded)
        given = [{**before[0], "betas": [0.8, 0.99]}, {**before[1], "lr": 0.4, "weight_decay": 0.0}]
        changes = take_over(loaded, None, given, before)
        assert changes == [("betas", [0.9, 0.99], [0.8, 0.99]), ("lr", 0.2, 0.4), ("weight_decay", 0.5, 0.0)]
        first, second = loaded.param_groups
        assert first["betas"] == (0.8, 0.99)
        assert isinstance(first["betas"], tuple)
        assert (first["lr"], second["lr"], second["weight_decay"]) == (0.1, 0.4, 0.0)

    def test_rate_keeps_its_ratio_to_the_base_rate(self):
        loaded = optimizer({"lr": 0.1})
        schedule = StepLR(loaded, 1, gamma=0.5)
        before = read_groups(loaded)
        loaded.step()
        schedule.step()
        wrapped = SimpleNamespace(scheduler=schedule)  # as accelerate does
        assert take_over(loaded, wrapped, [{**before[0], "initial_lr": 0.4}], before) == [("lr", 0.1, 0.4)]
        assert loaded.param_groups[0]["lr"] == pytest.approx(0.2)
        assert loaded.param_groups[0]["initial_lr"] == 0.4
        assert schedule.base_lrs == [0.4]

    def test_rate_of_a_warm_up_is_no_change(self):
        """The checkpoint's run may have had no schedule that stores a base rate."""
        loaded = optimizer({"lr": 0.1})
        given = [{**read_groups(loaded)[0], "initial_lr": 0.1, "lr": 0.0}]
        assert take_over(loaded, None, given, read_groups(loaded)) == []
        assert loaded.param_groups[0]["lr"] == 0.1

    def test_rate_from_zero_is_the_base_rate(self):
        loaded = optimizer({"lr": 0.0})
        before = read_groups(loaded)
        take_over(loaded, None, [{**before[0], "lr": 0.4}], before)
        assert loaded.param_groups[0]["lr"] == 0.4
        assert "initial_lr" not in loaded.param_groups[0]

    def test_rate_that_is_a_tensor_stays_the_same_tensor(self):
        """Compiled and fused optimizers read it at its address."""
        loaded = optimizer({"lr": torch.tensor(0.1)})
        rate, before = loaded.param_groups[0]["lr"], read_groups(loaded)
        take_over(loaded, None, [{**before[0], "lr": 0.4}], before)
        assert loaded.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(0.4)

    def test_schedules_inside_a_schedule_have_the_base_rates(self):
        loaded = optimizer({"lr": 0.1}, {"lr": 0.2})
        inner = [StepLR(loaded, 2), LambdaLR(loaded, lambda step: 1.0)]
        whole = SequentialLR(loaded, inner, milestones=[2])
        before = read_groups(loaded)
        given = [before[0], {**before[1], "initial_lr": 0.6}]
        take_over(loaded, whole, given, before)
        assert [schedule.base_lrs for schedule in inner] == [[0.1, 0.6]] * 2

    def test_schedule_of_now_gives_the_rates_at_once(self):
        """The form of a schedule that is a function of its step may have changed, without any change of a rate."""
        loaded = optimizer({"lr": 0.1}, {"lr": 0.2})
        schedule = LambdaLR(loaded, [lambda step: 1.0 + step, lambda step: 2.0])
        before = read_groups(loaded)
        schedule.last_epoch = 3
        assert take_over(loaded, SimpleNamespace(scheduler=schedule), before, before) == []
        assert [group["lr"] for group in loaded.param_groups] == pytest.approx([0.4, 0.4])
        assert schedule.get_last_lr() == pytest.approx([0.4, 0.4])

    def test_without_settings_of_the_checkpoint_its_groups_are_compared(self):
        """Of these, entries that may be an optimizer's state are not."""
        loaded = optimizer({"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": True}, kind=torch.optim.AdamW)
        StepLR(loaded, 1)
        given = read_groups(loaded)
        given[0] |= {"initial_lr": 0.2, "eps": 1.0, "amsgrad": False, "lr": 0.2}
        changes = take_over(loaded, None, given, None)
        assert changes == [("eps", 1e-8, 1.0), ("lr", 0.1, 0.2)]
        group = loaded.param_groups[0]
        assert (group["initial_lr"], group["lr"], group["eps"], group["amsgrad"]) == (0.2, 0.2, 1.0, True)


def test_kind_is_that_of_the_innermost_optimizer_and_of_the_schedule():
    inner = optimizer({"lr": 0.1})
    schedule = StepLR(inner, 1)
    wrapped, outer = optimizer({"lr": 0.1}, kind=torch.optim.AdamW), optimizer({"lr": 0.1}, kind=torch.optim.Adam)
    wrapped.optimizer, outer.optimizer = inner, wrapped
    expected = {"optimizer": "torch.optim.sgd.SGD", "schedule": "torch.optim.lr_scheduler.StepLR"}
    for each in (inner, wrapped, outer):
        for its in (schedule, SimpleNamespace(scheduler=schedule)):
            assert kind_of(each, its) == expected
    wrapped.optimizer = "no optimizer"
    assert kind_of(wrapped, schedule)["optimizer"] == "torch.optim.adamw.AdamW"
