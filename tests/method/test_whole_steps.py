"""Whole optimizer steps, with every option of the loss away from its default, against `slow_reference`.

Weights, metrics and the evaluation are compared in one process and in two. Each option that is put back to its
default, or swapped, changes the reference by far more than the tolerance.
"""

import copy
import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import run_module
from slow_reference import DEFAULTS, Logits, Row, SlowMiniLLM, next_token_logits
from whole_steps import (
    CASES,
    LEARNING_RATE,
    LM_ROWS,
    ROWS_OF_A_STEP,
    STEPS_OF_A_PASS,
    TEACHER_ROWS,
    Case,
    Recording,
    build_models,
    corpus,
    flat_weights,
    record,
    written_rows,
)

from minillm_trl import MiniLLMConfig

TOLERANCE = 1e-6  # GRPO has the rewards of functions in float32
ACTS = 1e-3

# Options with more values to swap than their default
CHOICES = {
    "importance_weighting": ("token", "decoupled", "prefix", "sequence"),
    "whiten_advantages": ("none", "tokens", "padding"),
    "scale_rewards": ("group", "batch", "none"),
}


@dataclass
class Step:
    """An optimizer step of the reference: its inputs, and what came of it."""

    buffer: list[Row]
    sampled_from: Logits  # of the whole buffer, under the student that sampled
    rows: list[Row]
    student: Logits
    corpus: Logits
    weights: torch.Tensor
    metrics: dict[str, float]


class Replay:
    """The reference trained on the rows that a run had, from the same weights.

    Args:
        case: options of the run.
        recordings: of each process.
    """

    def __init__(self, case: Case, recordings: Sequence[Recording]):
        self.case, self.recordings = case, recordings
        self.written = written_rows() if case.rollout_func else {}
        self.student, teacher = build_models()
        self.start = flat_weights(self.student)
        self.corpus_rows = corpus(case.texts, LM_ROWS * 2 * len(recordings))[1]
        steps = zip(*(recording.steps for recording in recordings), strict=True)
        rows = [self._merge(parts) for parts in steps]
        self.evaluation = self._merge([recording.evaluation for recording in recordings])
        all_rows = list({*chain.from_iterable(rows), *self.evaluation})
        with torch.no_grad():
            self.teacher = next_token_logits(teacher, [*all_rows, *self.corpus_rows])
            self.reference = next_token_logits(self.student, all_rows)
        self.steps = self._train(rows)
        self.own_gradients: dict[int, torch.Tensor] = {}

    def _merge(self, parts: Sequence[Sequence[Row]]) -> list[Row]:
        """The rows of all processes, as the rollout function wrote them where there is one."""
        rows = list(chain.from_iterable(parts))
        if not self.case.rollout_func:
            return rows
        assert all(row.completion == self.written[row.prompt].completion for row in rows)
        return [self.written[row.prompt] for row in rows]

    def _train(self, rows: list[list[Row]]) -> list[Step]:
        method, steps, one_buffer_ago = slow(self.case), [], copy.deepcopy(self.student)
        steps_of_a_buffer = STEPS_OF_A_PASS * self.case.all_options["num_iterations"]
        for number, rows_of_step in enumerate(rows):
            if number % steps_of_a_buffer == 0:
                buffer = list(chain.from_iterable(rows[number : number + STEPS_OF_A_PASS]))
                sampler = one_buffer_ago if self.case.options.get("overlap_rollouts") else self.student
                with torch.no_grad():
                    sampled_from = next_token_logits(sampler, buffer)
                one_buffer_ago = copy.deepcopy(self.student)
                constants = method.constants(buffer, sampled_from, self.teacher, self.reference)
            logits = next_token_logits(self.student, rows_of_step)
            corpus_logits = next_token_logits(self.student, self.corpus_rows)
            loss, metrics = method.loss(rows_of_step, logits, self.teacher, constants)
            corpus_loss, corpus_metrics = method.corpus_loss(self.corpus_rows, corpus_logits, self.teacher)
            total = loss + corpus_loss
            self._descend(total)
            metrics = {**metrics, **corpus_metrics, "loss": total.item()}
            detached = detach(logits), detach(corpus_logits)
            weights = flat_weights(self.student)
            steps.append(Step(buffer, sampled_from, rows_of_step, *detached, weights, metrics))
        return steps

    def _descend(self, loss: torch.Tensor) -> None:
        weights = list(self.student.parameters())
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight -= LEARNING_RATE * gradient

    def gradient(self, method: SlowMiniLLM, step: Step) -> torch.Tensor:
        """Of the loss of a step with respect to all logits."""
        student, corpus_logits = (
            {row: values.clone().requires_grad_() for row, values in logits.items()}
            for logits in (step.student, step.corpus)
        )
        constants = method.constants(step.buffer, step.sampled_from, self.teacher, self.reference)
        loss, _ = method.loss(step.rows, student, self.teacher, constants)
        corpus_loss, _ = method.corpus_loss(self.corpus_rows, corpus_logits, self.teacher)
        gradients = torch.autograd.grad(loss + corpus_loss, [*student.values(), *corpus_logits.values()])
        return torch.cat([gradient.flatten() for gradient in gradients])

    def own_gradient(self, number: int) -> torch.Tensor:
        """Of the loss of a step under the options of the case."""
        if number not in self.own_gradients:
            self.own_gradients[number] = self.gradient(slow(self.case), self.steps[number])
        return self.own_gradients[number]

    def evaluate(self) -> dict[str, float]:
        """Samples of the student alone, which therefore are weighted by 1, without baseline and token weights."""
        method = slow(
            self.case, teacher_mixed_alpha=0.0, advantage_baseline="none", iw_opd_gamma=0.0, top_entropy_quantile=1.0
        )
        with torch.no_grad():
            logits = next_token_logits(self.student, self.evaluation)
            constants = method.constants(self.evaluation, logits, self.teacher, self.reference)
            loss, metrics = method.loss(self.evaluation, logits, self.teacher, constants)
        return {f"eval_{name}": value for name, value in {**metrics, "loss": loss.item()}.items()}


def slow(case: Case, **changes: object) -> SlowMiniLLM:
    return SlowMiniLLM({**case.all_options, **changes}, TEACHER_ROWS, case.reward_funcs)


def detach(logits: Logits) -> Logits:
    return {row: values.detach() for row, values in logits.items()}


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    build_models()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def replay(student_folder: Path) -> Callable[[str], Replay]:
    """The replay of a case on one process, made once."""
    return functools.cache(lambda name: Replay(CASES[name], [record(CASES[name], student_folder, 1)]))


@pytest.fixture(scope="module")
def recordings_of_two(student_folder: Path) -> list[dict[str, Recording]]:
    """All cases, one after the other, on two processes."""
    script = Path(__file__).parents[1].joinpath("whole_steps_run.py")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", script, student_folder]
    result = run_module(*command)
    assert result.returncode == 0, result.stderr[-5000:]
    return [pickle.loads((student_folder / f"recordings_{process}.pickle").read_bytes()) for process in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_one_process_trains_as_the_reference(replay: Callable[[str], Replay], name: str):
    assert_trained_as(replay(name))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_the_reference(recordings_of_two: list[dict[str, Recording]], name: str):
    assert_trained_as(Replay(CASES[name], [recordings[name] for recordings in recordings_of_two]))


def assert_trained_as(played: Replay) -> None:
    assert len(played.steps) == 2 * STEPS_OF_A_PASS * played.case.all_options["num_iterations"]
    for start in range(0, len(played.steps), STEPS_OF_A_PASS):  # every pass goes over the whole buffer
        steps = played.steps[start : start + STEPS_OF_A_PASS]
        assert [len(step.rows) for step in steps] == [ROWS_OF_A_STEP] * STEPS_OF_A_PASS
        assert sorted(repr(row) for step in steps for row in step.rows) == sorted(map(repr, steps[0].buffer))
    recording = played.recordings[0]
    for step, weights in zip(played.steps, recording.weights, strict=True):
        assert (weights - step.weights).norm() < TOLERANCE * (step.weights - played.start).norm()
    logs = [entry for entry in recording.history if "loss" in entry]
    for step, entry in zip(played.steps, logs, strict=True):
        assert_logged(entry, step.metrics)
    assert_logged(recording.history[-1], played.evaluate())


def assert_logged(entry: dict[str, float], expected: dict[str, float]) -> None:
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def changes_of(case: Case) -> list[tuple[str, object]]:
    """Every option of the case, put back to its default or swapped."""
    changes = []
    for name, default in DEFAULTS.items():
        value = slow(case).options[name]
        others = CHOICES.get(name, (not value if isinstance(value, bool) else default,))
        changes += [(name, other) for other in others if other != value]
    return changes


def acts(played: Replay, option: str, value: object) -> bool:
    """Whether a change of an option changes the gradient of any step."""
    changed = slow(played.case, **{option: value})
    for number in reversed(range(len(played.steps))):  # the last ones have moved furthest
        expected = played.own_gradient(number)
        if (played.gradient(changed, played.steps[number]) - expected).norm() > ACTS * expected.norm():
            return True
    return False


@pytest.mark.parametrize("name", CASES)
def test_each_option_acts(replay: Callable[[str], Replay], name: str):
    played = replay(name)
    idle = {option for option, value in changes_of(played.case) if not acts(played, option, value)}
    assert idle == set(played.case.idle)


def test_every_option_acts_in_a_case():
    acting = [{option for option, _ in changes_of(case)} - set(case.idle) for case in CASES.values()]
    assert set().union(*acting) == DEFAULTS.keys()


def test_defaults_of_the_reference_are_those_of_the_package(tmp_path: Path):
    args = MiniLLMConfig(str(tmp_path), use_cpu=True)
    expected = {**DEFAULTS, "include_current_reward": False}  # None is resolved: not with the single step
    assert {name: getattr(args, name) for name in expected} == expected
