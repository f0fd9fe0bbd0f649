"""What a checkpoint stores of a run beyond transformers' part, and what a resumed run takes from it."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, ExportableState

from minillm_trl.training.exact_resume import EpochOrder, ExactResume, LoopState, RestoreOnTrainBegin


class Part:
    """A part of a run with one number."""

    def __init__(self, name: str, number: int):
        self.name, self.number = name, number

    def reset(self) -> None:
        self.number = 0

    def state(self) -> dict[str, int]:
        return {self.name: self.number}

    def restore(self, saved: dict[str, int]) -> None:
        self.number = saved[self.name]


class TestParts:
    def run(self, one: int, other: int, process: int = 0) -> ExactResume:
        args = SimpleNamespace(process_index=process, world_size=2)
        return ExactResume(args, (Part("one", one), Part("other", other)))

    def test_each_process_has_a_file_with_all_parts(self, tmp_path):
        for process in range(2):
            self.run(3 + process, 4, process).write(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"run_state_0-of-2.pt", "run_state_1-of-2.pt"}
        for process in range(2):
            resumed = self.run(8, 9, process)
            resumed.begin(str(tmp_path))
            assert [part.number for part in resumed.parts] == [0, 0]  # until transformers has restored its part
            resumed.restore()
            assert [part.number for part in resumed.parts] == [3 + process, 4]

    def test_state_of_an_earlier_moment_is_written_on_request(self, tmp_path):
        run = self.run(3, 4)
        earlier = run.state()
        run.parts[0].number = 7
        run.write(tmp_path, earlier)
        resumed = self.run(0, 0)
        resumed.begin(str(tmp_path))
        resumed.restore()
        assert resumed.state() == {"one": 3, "other": 4}

    def test_run_without_a_state_begins_with_reset_parts(self, tmp_path, caplog):
        run = self.run(3, 4)
        for checkpoint, warns in ((str(tmp_path), True), (None, False)):
            caplog.clear()
            run.begin(checkpoint)
            run.restore()
            assert run.state() == {"one": 0, "other": 0}
            assert ("has no run_state_0-of-2.pt" in caplog.text) is warns

    def test_file_that_would_run_code_is_refused(self, tmp_path):
        torch.save({"one": Part("one", 3)}, tmp_path / "run_state_0-of-2.pt")
        with pytest.raises(pickle.UnpicklingError, match="Part"):
            self.run(0, 0).begin(str(tmp_path))

    def test_second_run_forgets_the_checkpoint_of_the_first(self, tmp_path):
        run = self.run(3, 4)
        run.write(tmp_path)
        run.begin(str(tmp_path))
        run.begin(None)
        run.restore()
        assert run.state() == {"one": 0, "other": 0}


class TestLoop:
    def loop(self, step: int = 5, stops: bool = False, agreed: bool = False) -> LoopState:
        trainer = SimpleNamespace(
            args=SimpleNamespace(device=torch.device("cpu")),
            state=SimpleNamespace(global_step=step, max_steps=10),
            control=TrainerControl(should_training_stop=stops),
            _tr_loss=torch.tensor(0.5),
            _total_loss_scalar=2.0,
            _globalstep_last_logged=4,
            _initial_global_step=1,
            _metrics={"train": {"kl": [1.0, 2.0]}, "eval": {"kl": [3.0]}},
            _total_train_tokens=70,
        )
        return LoopState(trainer, SimpleNamespace(agreed=agreed))

    @pytest.mark.parametrize(
        ("options", "stopped"),
        [
            ({}, False),
            ({"stops": True}, True),
            ({"stops": True, "agreed": True}, False),  # by SIGTERM, from which a run resumes
            ({"stops": True, "step": 10}, False),  # at its end
            ({"stops": True, "step": 9}, True),
        ],
    )
    def test_run_that_stopped_early_is_known_as_such(self, options: dict, stopped: bool):
        assert self.loop(**options).state()["stopped_early"] is stopped

    def test_resumed_run_continues_with_what_was_not_logged(self):
        saved = self.loop(stops=True).state()
        resumed = self.loop()
        trainer = resumed.trainer
        trainer._tr_loss, trainer._total_loss_scalar, trainer._total_train_tokens = torch.zeros(()), 0.0, 0
        trainer._globalstep_last_logged = trainer._initial_global_step = 0
        resumed.reset()
        assert trainer._metrics == {"train": {}, "eval": {"kl": [3.0]}}
        assert resumed.had_stopped is False
        resumed.restore(saved)
        assert resumed.had_stopped is True
        assert trainer._metrics == {"train": {"kl": [1.0, 2.0]}, "eval": {"kl": [3.0]}}
        assert (trainer._tr_loss.item(), trainer._total_loss_scalar, trainer._total_train_tokens) == (0.5, 2.0, 70)
        assert (trainer._globalstep_last_logged, trainer._initial_global_step) == (4, 1)
        resumed.reset()
        assert resumed.had_stopped is False

    def test_saved_metrics_do_not_change_with_the_run(self):
        loop = self.loop()
        saved = loop.state()
        loop.trainer._metrics["train"]["kl"].append(9.0)
        assert saved["metrics"] == {"kl": [1.0, 2.0]}


def test_sampler_inside_accelerates_wrappers_has_the_epoch():
    class Epochs(SequentialSampler):
        epoch = None

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Epochs(range(4))
    inner = BatchSampler(sampler, 2, False)
    for batches in (
        inner,
        SimpleNamespace(batch_sampler=inner),
        SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=inner)),
    ):
        EpochOrder().begin(SimpleNamespace(batch_sampler=batches), 3, within=False)
        assert sampler.epoch == 3
        sampler.epoch = None
    EpochOrder().begin(DataLoader(range(4)), 3, within=False)  # its sampler has no epochs
    EpochOrder().begin(SimpleNamespace(batch_sampler=None), 3, within=False)  # as that of a stream
    EpochOrder().begin(SimpleNamespace(), 3, within=False)


def test_epoch_that_is_not_resumed_keeps_the_random_numbers():
    order = EpochOrder()
    torch.manual_seed(3)
    order.begin(DataLoader(range(4)), 0, within=True)  # nothing is stored
    first = torch.rand(1)
    saved = order.state()
    torch.manual_seed(4)
    order.begin(DataLoader(range(4)), 1, within=False)
    assert torch.rand(1) != first
    order.restore(saved)
    order.begin(DataLoader(range(4)), 1, within=True)
    assert torch.rand(1) == first
    order.reset()


class Stateful(TrainerCallback, ExportableState):
    def __init__(self, argument: int, count: int):
        self.argument, self.count = argument, count

    def state(self) -> dict:
        return {"args": {"argument": self.argument}, "attributes": {"count": self.count}}


class TestBegin:
    def begin(self, state: TrainerState, callbacks: list, output_dir: Path = Path("runs"), stopped: bool = False):
        """Begin a training; return what was called, and whether it stops at once."""
        calls = []
        settings = SimpleNamespace(
            take_over=lambda *arguments: calls.append(arguments), announce=lambda state: calls.append("announce")
        )
        loop = SimpleNamespace(had_stopped=stopped)
        resume = SimpleNamespace(restore=lambda: calls.append("restore"))
        handler = CallbackHandler(callbacks, None, None, None, None)
        control = TrainerControl()
        begun = RestoreOnTrainBegin(resume, loop, settings, handler)
        args = SimpleNamespace(output_dir=output_dir)
        begun.on_train_begin(args, state, control, optimizer="optimizer", lr_scheduler="schedule")
        return calls, control.should_training_stop

    def test_new_run_restores_nothing(self):
        assert self.begin(TrainerState(global_step=0, max_steps=4), []) == ([], False)

    @pytest.mark.parametrize(("step", "stops"), [(1, False), (3, False), (4, True), (5, True)])
    def test_run_that_has_ended_stops(self, step: int, stops: bool, caplog):
        calls = [("optimizer", "schedule"), "announce", "restore"]
        assert self.begin(TrainerState(global_step=step, max_steps=4), []) == (calls, stops)
        assert ("already ended" in caplog.text) is stops

    @pytest.mark.parametrize(
        ("counters", "stops"), [([], True), ([(2, 2)], True), ([(1, 2)], False), ([(1, 2), (3, 2)], True)]
    )
    def test_run_that_stopped_early_stays_stopped_as_long_as_a_patience_is_used_up(self, counters: list, stops: bool):
        callbacks = []
        for counter, patience in counters:
            callbacks.append(EarlyStoppingCallback(patience))
            callbacks[-1].early_stopping_patience_counter = counter
        state = TrainerState(global_step=2, max_steps=4)
        assert self.begin(state, callbacks, stopped=True)[1] is stops
        state = TrainerState(global_step=2, max_steps=4)
        assert self.begin(state, callbacks)[1] is False

    def test_callbacks_have_their_state_and_keep_their_arguments(self):
        """Several of a kind, one that is new, and one that the run no longer has."""
        saved = [{"args": {"argument": 9}, "attributes": {"count": count}} for count in (5, 6)]
        gone = {"args": {}, "attributes": {"count": 1}}
        state = TrainerState(global_step=2, max_steps=4, stateful_callbacks={"Stateful": saved, "Gone": gone})
        callbacks = [Stateful(1, 0), Stateful(2, 0), Stateful(3, 7), EarlyStoppingCallback(4)]
        self.begin(state, [*callbacks, TrainerCallback()])
        assert [(each.argument, each.count) for each in callbacks[:3]] == [(1, 5), (2, 6), (3, 7)]
        assert state.stateful_callbacks.keys() == {"Stateful", "Gone", "EarlyStoppingCallback"}
        assert state.stateful_callbacks["EarlyStoppingCallback"] == callbacks[3].state()
        one = TrainerState(global_step=2, max_steps=4, stateful_callbacks={"Stateful": saved[0]})
        callbacks = [Stateful(1, 0), Stateful(2, 3)]
        self.begin(one, callbacks)
        assert [each.count for each in callbacks] == [5, 3]

    def test_best_checkpoint_is_that_of_the_runs_folder_of_now(self, tmp_path):
        for best, there, expected in (
            (2, True, str(tmp_path / "checkpoint-2")),
            (3, False, "before/checkpoint-3"),
            (None, True, "before/checkpoint-3"),
        ):
            state = TrainerState(global_step=4, max_steps=8, best_global_step=best)
            state.best_model_checkpoint = "before/checkpoint-3"
            if there and best:
                (tmp_path / f"checkpoint-{best}").mkdir()
            self.begin(state, [], tmp_path)
            assert state.best_model_checkpoint == expected
