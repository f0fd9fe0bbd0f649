"""The thread of `overlap_rollouts`: its errors, how it ends, and who waits for it."""

import threading
import traceback
from contextlib import nullcontext

import pytest
import torch
from test_overlap import THREAD, threads
from test_reliable_runs import AtStep
from test_trainer import DATASET, make_trainer

from minillm_trl.rollouts.rollout_sampler import SampledTurn, ScoredRows
from minillm_trl.training.rollout_scoring import RolloutScoring


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
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    started, overlap.copy.refresh = [], lambda student: started.append(student)
    overlap.start("student", "turn", sample)
    overlap.wait()
    assert (started, order) == (["student"], ["sample", "stream", False])
    assert overlap._ahead.sampled.result().completions == [[5]]
