"""The thread of `overlap_rollouts`: its errors, how it ends, and who waits for it."""

import threading
import traceback
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_overlap import THREAD, threads
from test_reliable_runs import AtStep
from test_trainer import DATASET, make_config, make_trainer

from minillm_trl.rollouts.rollout_sampler import SampledTurn, ScoredRows
from minillm_trl.rollouts.scores import RolloutScores
from minillm_trl.training.overlapped_rollouts import OverlappedRollouts
from minillm_trl.training.rollout_buffer import RolloutBuffer
from minillm_trl.training.rollout_scoring import RolloutScoring
from minillm_trl.training.turns import Turn


def test_error_is_raised_when_its_rollout_is_due_with_the_traceback(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=6, overlap_rollouts=True)

    def fail(self, batch, scores):
        if threading.current_thread().name == THREAD:
            raise ArithmeticError("the teacher broke")
        return scores

    monkeypatch.setattr(RolloutScoring, "add_teacher", fail)
    with pytest.raises(ArithmeticError, match="the teacher broke") as raised:
        trainer.train()
    names = {frame.name for frame in traceback.extract_tb(raised.value.__traceback__)}
    assert {"sample_ahead", "fail", "wait", "train"} <= names
    assert trainer.state.global_step == 2  # the updates on the first buffer were done
    assert not threads()


@pytest.mark.parametrize("scores", [False, True], ids=["while the copy samples", "while the teacher scores"])
def test_interrupt_ends_it_after_the_current_forward_pass(tmp_path, scores: bool):
    options = {"max_completion_length": 100}
    if scores:  # in eight passes of a row
        options = {"teacher_mixed_alpha": 0.0, "per_device_train_batch_size": 1, "steps_per_generation": 8}
    trainer = make_trainer(tmp_path, max_steps=12, overlap_rollouts=True, **options)
    passes, reached = [], threading.Event()

    def slow(*unused):
        if threading.current_thread().name == THREAD:
            passes.append(1)
            reached.set()
            threading.Event().wait(0.05)

    model = trainer._teacher.models[0] if scores else trainer._overlap.copy.model
    model.base_model.register_forward_pre_hook(slow)

    def interrupt():
        assert reached.wait(60)
        raise KeyboardInterrupt

    trainer.add_callback(AtStep(1, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not threads()
    assert len(passes) < (4 if scores else 50)
    assert trainer.evaluate(DATASET.select(range(4)))["eval_loss"] > 0  # its copy still samples


def test_teacher_of_the_caller_keeps_no_hook(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, overlap_rollouts=True)
    trainer.train()
    models = (trainer._teacher.models[0], trainer._overlap.copy.model)
    assert not any(model.base_model._forward_pre_hooks for model in models)


def test_scoring_given_completions_waits_for_the_thread(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, overlap_rollouts=True)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 2, dtype=torch.long)
    alive = []

    def score():
        trainer.score_rollouts(ids[:, :2], mask, ids[:, 2:], mask)
        alive.append(threads())

    trainer.add_callback(AtStep(1, score))
    trainer.train()
    assert alive == [[]]


def test_a_rollout_is_handed_over_when_its_stream_has_ended(tmp_path, monkeypatch):
    """As its kernels may still run when the thread has queued them; a CPU has no streams, so this one is pretended."""
    overlap, order = make_trainer(tmp_path, overlap_rollouts=True)._overlap, []

    class Stream:
        def synchronize(self) -> None:
            order.append("stream")
            order.append(overlap._ahead.sampled.done())

    def sample(*unused) -> SampledTurn:
        order.append("sample")
        return SampledTurn([[5]], ScoredRows())

    monkeypatch.setattr(overlap, "_own_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(order.append("in the stream")))
    started, overlap.copy.refresh = [], lambda student: started.append(student)
    overlap.start("student", "turn", sample)
    overlap.wait()
    assert (started, order) == (["student"], ["in the stream", "sample", "stream", False])
    assert overlap._ahead.sampled.result().completions == [[5]]


TURN = Turn([[5], [6]], [(1,), (2,)], (3,), 4, [0, 1])
LOGPS = torch.tensor([[-1.0], [-2.0]])


class Alone:
    """`OverlappedRollouts` with a copy that samples the completions [7] and [8], and records what happens to it."""

    def __init__(self, tmp_path, **options):
        self.calls = []
        model = torch.nn.Linear(1, 1)
        model.base_model, model.device = model, torch.device("cpu")
        copy = SimpleNamespace(
            model=model,
            refresh=lambda student: self.calls.append(f"refresh {student}"),
            release=lambda: self.calls.append("release"),
            precision=lambda accelerator: nullcontext(),
        )
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        self.buffer = RolloutBuffer(make_config(tmp_path, **options), accelerator, "digest")
        self.rollouts = OverlappedRollouts(copy, self.buffer, accelerator)

    def start(self, turn: Turn = TURN) -> None:
        scores = RolloutScores(student_logps=LOGPS.clone())

        def sample(model: torch.nn.Module, turn: Turn) -> SampledTurn:
            model(torch.ones(1, 1))
            return SampledTurn([[7], [8]], ScoredRows([([0, 1], scores)]))

        self.rollouts.start("student", turn, sample)


def test_copy_samples_with_the_precision_of_the_run(tmp_path):
    alone, found = Alone(tmp_path), []
    alone.rollouts.copy.precision = lambda accelerator: torch.autocast("cpu", torch.bfloat16)

    def sample(model, turn) -> SampledTurn:
        found.append(model(torch.ones(1, 1)).dtype)
        return SampledTurn([[7], [8]], ScoredRows())

    alone.rollouts.start("student", TURN, sample)
    alone.rollouts.wait()
    assert found == [torch.bfloat16]


class TestStreams:
    """Those of CUDA, with stand-ins."""

    def test_thread_has_one_stream_that_waits_for_the_work_so_far(self, tmp_path, monkeypatch):
        class Stream:
            def __init__(self, device: torch.device):
                self.device, self.waited = device, []

            def wait_stream(self, stream: str) -> None:
                self.waited.append(stream)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
        alone = Alone(tmp_path)
        assert alone.rollouts._own_stream() is None  # on a CPU
        alone.rollouts.copy.model.device = torch.device("cuda", 1)
        stream = alone.rollouts._own_stream()
        assert alone.rollouts._own_stream() is stream
        assert (stream.device, stream.waited) == (torch.device("cuda", 1), ["that of cuda:1"] * 2)

    def test_memory_of_scores_is_kept_for_the_stream_of_the_updates(self, tmp_path, monkeypatch):
        """The thread's stream could use it again otherwise, before the updates have read it."""
        kept = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
        on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=kept.append)
        alone = Alone(tmp_path)
        scores = RolloutScores(student_logps=LOGPS, teacher_logps=on_gpu)
        alone.rollouts.start("student", TURN, lambda *unused: SampledTurn([[7], [8]], ScoredRows([([0, 1], scores)])))
        alone.rollouts.wait()
        assert kept == ["that of cuda:0"]


class TestTake:
    def test_rollout_of_the_turn_is_taken_once(self, tmp_path):
        alone = Alone(tmp_path)
        assert list(alone.rollouts.take_totals().values()) == [(0, 0), (0.0, 0)]
        assert alone.rollouts.take(TURN) is None
        alone.start()
        assert alone.rollouts.take(TURN).completions == [[7], [8]]
        assert alone.calls == ["refresh student", "release"]
        assert alone.rollouts.take(TURN) is None
        (ahead, rollouts), (seconds, of) = alone.rollouts.take_totals().values()
        assert (ahead, rollouts, of) == (1, 3, 3)
        assert 0.0 < seconds < 60.0
        assert list(alone.rollouts.take_totals().values()) == [(0, 0), (0.0, 0)]

    @pytest.mark.parametrize(
        ("changes", "taken"),
        [
            ({"coin_key": (9,)}, True),
            ({"prompt_ids": [[5], [7]]}, False),
            ({"keys": [(1,), (9,)]}, False),
            ({"max_new_tokens": 5}, False),
            ({"teacher_index": [1, 1]}, False),
        ],
    )
    def test_rollout_of_another_turn_is_discarded(self, tmp_path, caplog, changes: dict, taken: bool):
        alone = Alone(tmp_path)
        alone.start()
        assert (alone.rollouts.take(TURN._replace(**changes)) is not None) is taken
        assert ("It is discarded" in caplog.text) is not taken
        assert alone.rollouts.take_totals()["rollout/staleness"] == (int(taken), 1)

    def test_waiting_twice_frees_the_copy_once(self, tmp_path):
        alone = Alone(tmp_path)
        alone.rollouts.wait()
        alone.start()
        for _ in range(2):
            alone.rollouts.wait()
        assert alone.calls == ["refresh student", "release"]
        alone.rollouts.stop()  # the thread has ended already
        assert alone.calls == ["refresh student", "release"]
        assert alone.rollouts.take(TURN) is None

    def test_stopped_rollout_is_dropped_and_the_next_one_runs(self, tmp_path):
        alone = Alone(tmp_path)
        alone.start()
        alone.rollouts.reset()
        assert alone.calls == ["refresh student", "release"]
        assert alone.rollouts.take(TURN) is None
        alone.start()
        assert alone.rollouts.take(TURN).completions == [[7], [8]]


class TestState:
    def test_resumed_run_has_the_rollout_with_its_scores(self, tmp_path):
        alone, resumed = Alone(tmp_path), Alone(tmp_path)
        assert alone.rollouts.state() == {"rollout_ahead": None}
        resumed.rollouts.restore(alone.rollouts.state() | alone.buffer.state())
        assert resumed.rollouts.take(TURN) is None
        alone.start()
        torch.save(alone.rollouts.state() | alone.buffer.state(), tmp_path / "state.pt")
        assert alone.calls == ["refresh student", "release"]  # the copy is free while the checkpoint is written
        resumed.rollouts.restore(torch.load(tmp_path / "state.pt", weights_only=True))
        found = resumed.rollouts.take(TURN)
        assert found.completions == [[7], [8]]
        ((rows, scores),) = found.scores.parts
        assert rows == [0, 1]
        assert torch.equal(scores.student_logps, LOGPS)
        assert scores.teacher_logps is None
        assert resumed.calls == []

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
    def test_rollout_of_other_settings_is_discarded(self, tmp_path, caplog, options: dict):
        alone, resumed = Alone(tmp_path), Alone(tmp_path, **options)
        alone.start()
        resumed.rollouts.restore(alone.rollouts.state() | alone.buffer.state())
        assert (resumed.rollouts.take(TURN) is None) is bool(options)
        assert ("sampled with temperature=1.0. It is discarded." in caplog.text) is bool(options)

    def test_checkpoint_of_a_run_without_overlap_has_none(self, tmp_path):
        alone = Alone(tmp_path)
        alone.rollouts.restore(alone.buffer.state())
        assert alone.rollouts.take(TURN) is None
