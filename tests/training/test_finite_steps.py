"""`StepGuard` on its own: what it notes of a loss, and what it does before an optimizer step."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from minillm_trl.training.finite_steps import StepGuard


class Scaler:
    """The loss scale of a run in float16."""

    def __init__(self, scale: float):
        self.scale, self.updates = scale, []

    def get_scale(self) -> float:
        return self.scale

    def update(self, scale: float) -> None:
        self.updates.append(scale)


@pytest.fixture
def guard() -> StepGuard:
    args = SimpleNamespace(max_nonfinite_steps=3, fp16=False, device=torch.device("cpu"))
    return StepGuard(Accelerator(cpu=True), args)


def step(guard: StepGuard, norm: float | torch.Tensor | None, number: int = 0, **options: object) -> tuple[bool, bool]:
    """Return whether the guard skips a step, and whether it stops the run."""
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).backward()
    taken = SimpleNamespace(step_was_skipped=False)
    stops = guard.agree_on_step(norm, number, model, taken, **options)
    gradients = [parameter.grad is None for parameter in model.parameters()]
    assert len(set(gradients)) == 1
    return gradients[0], stops


def test_finite_step_is_taken(guard: StepGuard):
    for norm in (0.5, torch.tensor(0.5), 0.0, None):
        assert step(guard, norm) == (False, False)
    assert step(guard, 0.5, stops=True) == (False, True)
    assert guard.state() == {"nonfinite_steps": (0, 0)}


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), torch.tensor(torch.nan)])
def test_step_with_a_gradient_that_is_not_finite_is_skipped_and_explained(guard: StepGuard, caplog, norm):
    assert step(guard, norm, 7, stops=True) == (True, True)
    assert f"step 7 is skipped: the gradient's norm is {float(norm)}, while all losses are finite." in caplog.text


def test_step_with_a_fault_is_skipped_whether_the_norm_is_known_or_not(guard: StepGuard, caplog):
    for norm in (0.5, None):
        guard.faults.append(f"the loss with the norm {norm} is bad")
        assert step(guard, norm) == (True, False)
        assert f"skipped: the loss with the norm {norm} is bad." in caplog.text
        assert guard.faults == []
    assert step(guard, 0.5) == (False, False)


def test_first_faults_are_explained(guard: StepGuard, caplog):
    guard.faults += [f"fault {number}" for number in range(6)]
    step(guard, 1.0)
    assert "fault 0; fault 1; fault 2; fault 3." in caplog.text


def test_rest_of_a_faulty_step_has_no_finite_loss(guard: StepGuard):
    explained = []

    def explain(loss: float) -> str:
        explained.append(loss)
        return f"loss {loss}"

    assert guard.check_loss(torch.tensor(2.0), explain) == 2.0
    assert guard.check_loss(torch.tensor(torch.inf), explain).isnan()
    assert guard.check_loss(torch.tensor(2.0), explain).isnan()
    assert guard.check_loss(torch.tensor(-torch.inf), explain).isnan()
    assert explained == [torch.inf]  # the first one of the step
    assert guard.faults == ["loss inf"]


def test_run_ends_after_steps_in_a_row_alone(guard: StepGuard):
    for norm in (torch.nan, torch.nan, 1.0, torch.nan, torch.nan):
        step(guard, norm)
    assert guard.state() == {"nonfinite_steps": (4, 2)}
    with pytest.raises(
        FloatingPointError, match=r"3 optimizer steps in a row .*the last one, 9, because the gradient"
    ):
        step(guard, torch.nan, 9)


def test_resumed_run_continues_the_counts_and_a_new_one_starts_them(guard: StepGuard):
    for norm in (torch.nan, 1.0, torch.nan):
        step(guard, norm)
    other = StepGuard(guard.accelerator, guard.args)
    other.restore(guard.state())
    assert (other.skipped, other.skipped_in_row) == (2, 1)
    other.faults.append("of an interrupted step")
    other.reset()
    assert (other.skipped, other.skipped_in_row, other.faults) == (0, 0, [])


class TestFloat16:
    @pytest.fixture
    def scaled(self, guard: StepGuard, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepGuard]:
        monkeypatch.setattr(guard.accelerator, "scaler", Scaler(1024.0))
        yield guard
        guard.accelerator.gradient_state._set_sync_gradients(True)  # all accelerators share it

    def test_overflow_is_left_to_the_scaler(self, scaled: StepGuard):
        scaled.agree_on_step(torch.inf, 0, torch.nn.Linear(1, 1), None)
        assert scaled.skipped == 0
        assert scaled.accelerator.scaler.updates == []

    def test_fault_keeps_the_scale(self, scaled: StepGuard):
        scaled.faults.append("the loss is nan")
        assert scaled.accelerator.sync_gradients
        scaled.agree_on_step(torch.inf, 0, torch.nn.Linear(1, 1), None)
        assert scaled.skipped == 1
        assert scaled.accelerator.scaler.updates == [1024.0]
        assert not scaled.accelerator.sync_gradients  # accelerate calls neither scaler nor optimizer

    @pytest.mark.parametrize(("scale", "skipped"), [(1.0, 0), (0.5, 1)])
    def test_scale_below_one_is_a_fault(self, scaled: StepGuard, caplog, scale: float, skipped: int):
        scaled.accelerator.scaler.scale = scale
        scaled.agree_on_step(1.0, 0, torch.nn.Linear(1, 1), None)
        assert scaled.skipped == skipped
        assert ("the loss scale fell to 0.5" in caplog.text) == bool(skipped)


class TestDeepSpeed:
    def test_step_that_was_taken_with_a_fault_ends_the_run(self, guard: StepGuard):
        guard.faults.append("the loss is nan")
        with pytest.raises(FloatingPointError, match="Step 2 broke the weights: the loss is nan"):
            guard.agree_on_step(1.0, 2, torch.nn.Linear(1, 1), SimpleNamespace(step_was_skipped=False), object())

    def test_skipped_step_keeps_the_loss_scale(self, guard: StepGuard):
        """DeepSpeed takes the NaN for an overflow, and lowers its scale within the backward pass."""
        scaler = SimpleNamespace(cur_scale=1024.0)
        engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        for loss, kept in ((torch.nan, 1024.0), (1.0, 512.0)):
            guard.check_loss(torch.tensor(loss), str, engine)
            scaler.cur_scale = 512.0
            guard.agree_on_step(None, 0, torch.nn.Linear(1, 1), SimpleNamespace(step_was_skipped=True), engine)
            assert scaler.cur_scale == kept
        assert guard.skipped == 1

    def test_overflow_in_float16_is_left_to_the_engine(self, guard: StepGuard):
        """accelerate has no scaler then, since DeepSpeed scales the loss itself."""
        guard.args.fp16 = True
        taken = SimpleNamespace(step_was_skipped=False)
        assert not guard.agree_on_step(torch.inf, 0, torch.nn.Linear(1, 1), taken, object())
        assert guard.skipped == 0

    def test_engine_without_a_scale_skips_too(self, guard: StepGuard):
        engine = SimpleNamespace(optimizer=SimpleNamespace())
        guard.check_loss(torch.tensor(torch.nan), str, engine)
        guard.agree_on_step(None, 0, torch.nn.Linear(1, 1), SimpleNamespace(step_was_skipped=True), engine)
        assert guard.skipped == 1
