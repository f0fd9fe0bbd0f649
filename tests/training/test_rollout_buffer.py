"""`RolloutBuffer`: its micro-batches, their counts, and what of it a resumed run can use."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_trainer import make_config

from minillm_trl.rollouts.buffer import pin_states
from minillm_trl.rollouts.keyed_random import ROLLOUT_ORDER, keyed_uniforms
from minillm_trl.training.rollout_buffer import RolloutBuffer, RolloutCounts, loss_normalizer, pack


def buffer(tmp_path: Path, **options) -> RolloutBuffer:
    return RolloutBuffer(make_config(tmp_path, **options), Accelerator(cpu=True), "digest")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"logging_steps": 7}, True),
        ({"advantage_baseline": "position"}, False),
        ({"reward_estimator": "expected"}, False),
        ({"teacher_server_url": ["http://localhost:1"]}, False),  # a served teacher can have the digest of a local one
    ],
)
def test_rollouts_are_kept_with_the_settings_that_made_them(tmp_path: Path, options: dict, kept: bool):
    common = {"teacher_mixed_alpha": 0.0}
    before = buffer(tmp_path, **common)
    before.batches, before._position = [{"completion_ids": torch.zeros(1, 2)}], 1
    after = buffer(tmp_path, **common, **options)
    after.restore(before.state())
    assert (after.batches is not None) == kept


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_states_on_the_cpu_are_pinned_for_a_cuda_device_alone(tmp_path: Path, monkeypatch, device: str, pinned: bool):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append(self.shape) or self + 1)
    states, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    batch = pin_states({"teacher_hidden_states": states, "completion_ids": ids}, torch.device(device))
    assert calls == ([states.shape] if pinned else [])
    assert batch["teacher_hidden_states"].unique().tolist() == [float(pinned)]
    assert batch["completion_ids"] is ids
    assert not states.any()
    assert pin_states({"completion_ids": ids}, torch.device(device)) == {"completion_ids": ids}
    on_device = {"teacher_hidden_states": torch.zeros(2, 3, 4, device="meta")}  # as states that stay on the device
    assert pin_states(on_device, torch.device(device)) is on_device


def test_buffer_pins_new_and_restored_micro_batches(tmp_path: Path, monkeypatch):
    pinned = []
    name = "minillm_trl.training.rollout_buffer.pin_states"
    monkeypatch.setattr(name, lambda batch, device: pinned.append(device) or batch)
    before = buffer(tmp_path, steps_per_generation=2, teacher_hidden_states="cpu")
    rows, tokens = 8, torch.ones(8, 3, dtype=torch.long)
    masks = {"prompt_mask": tokens, "completion_mask": tokens, "prompt_ids": tokens, "completion_ids": tokens}
    before.batches = before._deal({**masks, "faulty": torch.zeros(rows, dtype=torch.bool)}, 0)
    before._position = 1
    assert pinned == [torch.device("cpu")] * 2
    after = buffer(tmp_path, steps_per_generation=2, teacher_hidden_states="cpu")
    after.restore(before.state())
    assert len(pinned) == 4


@pytest.mark.parametrize(("steps", "generations"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_halves_of_processes_are_those_of_one_that_has_all_rows(tmp_path: Path, steps: int, generations: int):
    """Completions of a prompt are in one half, and each half has as many rows."""

    def halves(process: int, processes: int) -> list[int]:
        part = buffer(tmp_path, steps_per_generation=steps, num_generations=generations)
        of = {"process_index": process, "num_processes": processes, "device": torch.device("cpu")}
        part.accelerator = SimpleNamespace(**of)
        return part.halves(16 // processes).tolist()

    one = halves(0, 1)
    assert [half for process in range(2) for half in halves(process, 2)] == one
    assert [half for process in range(4) for half in halves(process, 4)] == one
    assert sum(one) == 8
    groups = [set(one[start : start + generations]) for start in range(0, 16, generations)]
    assert all(len(group) == 1 for group in groups)
    assert groups[0] == {0}


def rollout(rows: int, first: int = 0) -> dict[str, torch.Tensor]:
    """Rows with a number each, completions of 1 to 4 tokens, and every fifth row faulty."""
    number = torch.arange(first, first + rows)
    mask = (torch.arange(4) <= (number % 4)[:, None]).long()
    return {
        "prompt_ids": number[:, None].expand(-1, 3).clone(),
        "prompt_mask": (torch.arange(3) >= (number % 3)[:, None]).long(),
        "completion_ids": number[:, None].expand(-1, 4).clone(),
        "completion_mask": mask,
        "faulty": number % 5 == 4,
        "number": number,
    }


@pytest.mark.parametrize(("accumulation", "iterations"), [(1, 1), (2, 1), (2, 2), (4, 3), (8, 1)])
def test_each_rollout_is_read_in_whole_passes_of_optimizer_steps(tmp_path: Path, accumulation: int, iterations: int):
    """A run that resumes without its buffer starts with the fourth rollout."""
    micro_batches = max(4, accumulation)
    options = {"per_device_train_batch_size": 2, "steps_per_generation": micro_batches, "num_iterations": iterations}
    read = buffer(tmp_path, gradient_accumulation_steps=accumulation, **options)
    of_a_rollout, made = micro_batches * iterations, []
    assert read.seconds == 0.0

    def make() -> dict[str, torch.Tensor]:
        following = len(made) + 4
        assert read.next_rollout == (following, following * of_a_rollout // accumulation)
        made.append(rollout(2 * micro_batches, 100 * len(made)))
        return made[-1]

    window = []
    for count in range(3 * of_a_rollout):
        number, batch = read.next((3 * of_a_rollout + count) // accumulation, make)
        assert number == count % accumulation
        window.append(batch)
        assert len(batch["number"]) == 2
        if len(window) == accumulation:
            trained = [part["completion_mask"].sum().item() for part in window]
            healthy = [(~part["faulty"]).sum().item() for part in window]
            assert {int(part["window_tokens"]) for part in window} == {sum(trained)}
            assert {int(part["window_rows"]) for part in window} == {sum(healthy)}
            window = []
    assert len(made) == 3
    assert 0.0 < read.seconds < 60.0


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_an_optimizer_step_do_not_depend_on_the_number_of_processes(tmp_path: Path, processes: int):
    options = {"per_device_train_batch_size": 4 // processes, "steps_per_generation": 4}
    steps: list[set[int]] = [set() for _ in range(4)]
    for process in range(processes):
        part = buffer(tmp_path, **options)
        accelerator = {"process_index": process, "num_processes": processes, "device": torch.device("cpu")}
        part.accelerator = SimpleNamespace(**accelerator, reduce=lambda count, reduction: 10 * count)
        rows = 16 // processes
        for step, batch in enumerate(part._deal(rollout(rows, process * rows), 6)):
            steps[step] |= set(batch["number"].tolist())
            assert int(batch["window_tokens"]) == 10 * int(batch["completion_mask"].sum())
            assert batch["completion_mask"].shape[1] == batch["completion_mask"].sum(dim=1).max()
    assert steps == EXPECTED_STEPS
    assert steps != [set(batch["number"].tolist()) for batch in buffer(tmp_path, **options)._deal(rollout(16), 5)]


# Rows of the optimizer steps of a rollout at step 6: each block of four rows gives one to each step
EXPECTED_STEPS = [set(), set(), set(), set()]
for _block in range(4):
    _key = (42, ROLLOUT_ORDER, 6, _block) if _block else (42, ROLLOUT_ORDER, 6)  # trailing zeros are left out
    for _step, _row in enumerate(keyed_uniforms(4, *_key).argsort().tolist()):
        EXPECTED_STEPS[_step].add(4 * _block + _row)


def test_steps_of_a_rollout_have_their_longest_rows_first(tmp_path: Path):
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    for start in (0, 2):
        batches = buffer(tmp_path, **options)._deal(rollout(8), 1)[start:][:2]
        lengths = [
            length
            for batch in batches
            for length in (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)).tolist()
        ]
        assert lengths == sorted(lengths, reverse=True)


def test_resumed_buffer_continues_where_it_was(tmp_path: Path):
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "num_iterations": 2}
    whole = buffer(tmp_path, **options)
    for count in range(8):
        whole.next(count, lambda: rollout(8))
        saved = whole.state()
        assert (saved["rollouts"] is None) == (count == 7)
        resumed = buffer(tmp_path, **options)
        resumed.restore(saved)
        if count == 7:
            assert resumed.batches is None
            continue
        assert resumed.next_rollout == whole.next_rollout == (1, 8)
        number, batch = resumed.next(count + 1, lambda: pytest.fail("the buffer is not used up"))
        assert torch.equal(batch["number"], whole.batches[(count + 1) % 4]["number"])
        assert number == 0
    whole.reset()
    assert whole.batches is None


def test_each_setting_that_made_a_rollout_is_compared(tmp_path: Path):
    saved = buffer(tmp_path).state() | {"rollouts": []}
    for name in saved["made_by"]:
        other = {**saved, "made_by": {**saved["made_by"], name: "another"}}
        assert buffer(tmp_path).changed_settings(other) == {name: "another"}
    older = {"cut_by": {"seed": 1, "num_generations": 1}}
    assert buffer(tmp_path).changed_settings(older) == {"seed": 1}
    assert buffer(tmp_path).changed_settings(saved) == {}
    assert saved["made_by"]["teacher_model"] == "digest"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("teachers", None, False),
        ("teachers", {"math": "runs/teacher"}, False),
        ("teacher_server_url", ["http://localhost:1"], True),
        ("offline_teacher", "scores", True),
        ("teachers", {"math": "runs/teacher", "code": "http://localhost:1"}, ["code"]),
    ],
)
def test_teacher_whose_states_are_no_hidden_states_is_another_one(tmp_path: Path, field: str, value, expected):
    made = buffer(tmp_path)
    setattr(made.args, field, value)
    assert made.state()["made_by"]["teacher_is_served"] == expected


@pytest.mark.parametrize(("place", "moved"), [("cpu", False), ("device", True)])
def test_tensors_of_a_checkpoint_are_placed_where_they_were(tmp_path: Path, place: str, moved: bool):
    read = buffer(tmp_path, teacher_hidden_states=place)
    read.accelerator = SimpleNamespace(device=torch.device("meta"))
    found = read.unpack({"teacher_hidden_states": torch.ones(1), "completion_ids": torch.ones(1)})
    assert found["completion_ids"].is_meta
    assert found["teacher_hidden_states"].is_meta is moved


def test_run_that_resumes_without_its_buffer_samples_and_continues_within_the_pass(tmp_path: Path):
    read = buffer(tmp_path, per_device_train_batch_size=2, steps_per_generation=4)
    made = []
    number, batch = read.next(6, lambda: made.append(0) or rollout(8))
    assert (number, len(made), read.next_rollout) == (0, 1, (2, 8))
    assert torch.equal(batch["number"], read.batches[2]["number"])


def test_packed_tensors_are_copies_of_what_they_show(tmp_path: Path):
    whole = torch.randn(100, 3, requires_grad=True)
    packed = pack({"view": whole[:2]})["view"]
    assert packed.untyped_storage().nbytes() == 2 * 3 * 4  # so a checkpoint is no larger than its rows
    assert not packed.requires_grad
    assert torch.equal(packed, whole[:2])


@pytest.mark.parametrize(
    ("rows", "generations", "accumulation", "unit"),
    [
        (8, 2, 1, 4),
        (6, 2, 1, 2),
        (4, 2, 1, 2),
        (12, 3, 1, 3),
        (24, 3, 1, 12),
        (8, 1, 2, 2),
        (3, 1, 2, 1),
        (2, 1, 4, 1),
    ],
)
def test_halves_are_blocks_of_whole_groups_and_steps_if_both_fit_twice(
    tmp_path: Path, rows: int, generations: int, accumulation: int, unit: int
):
    """A rollout has four micro-batches."""
    options = {"steps_per_generation": 4, "num_generations": generations, "per_device_train_batch_size": 3}
    found = buffer(tmp_path, gradient_accumulation_steps=accumulation, **options).halves(rows)
    assert found.tolist() == [row // unit % 2 for row in range(rows)]


class TestCounts:
    def counts(self, overflows=None, main: bool = True) -> RolloutCounts:
        accelerator = SimpleNamespace(gather=lambda own: torch.cat([own, own]), is_main_process=main)
        return RolloutCounts(accelerator, overflows)

    @pytest.mark.parametrize("main", [True, False])
    def test_rows_that_are_left_out_are_counted_over_processes(self, main: bool, caplog):
        counts = self.counts(main=main)
        left = counts.leave_out_faulty(rollout(10))
        assert not left["completion_mask"][[4, 9]].any()
        assert torch.equal(left["completion_mask"][:4], rollout(10)["completion_mask"][:4])
        assert counts.metrics(None) == {"nonfinite_completions": 4.0}
        assert ("4 of 20 completions are left out of the update." in caplog.text) is main
        caplog.clear()
        counts.leave_out_faulty(rollout(4))
        assert caplog.text == ""
        counts.leave_out_faulty(rollout(5))
        assert counts.state() == {"nonfinite_completions": 6, "overflows": None}
        counts.reset()
        assert counts.left_out == 0

    def test_resumed_run_continues_with_them(self):
        overflows = SimpleNamespace(skipped_steps=3, metrics=lambda engine: {"fp16/of": engine})
        counts = self.counts(overflows)
        assert counts.metrics(5.0) == {"nonfinite_completions": 0.0, "fp16/of": 5.0}
        counts.left_out = 2
        saved = counts.state()
        assert saved == {"nonfinite_completions": 2, "overflows": 3}
        other = self.counts(SimpleNamespace(skipped_steps=0))
        other.restore(saved)
        assert (other.left_out, other.overflows.skipped_steps) == (2, 3)
        other.restore({"nonfinite_completions": 1, "overflows": None})  # of a run in another precision
        assert (other.left_out, other.overflows.skipped_steps) == (1, 3)
        self.counts().restore(saved)


@pytest.mark.parametrize(("reduction", "window", "own"), [("sequence_sum", 6, 2), ("token_mean", 10, 5)])
def test_loss_is_normalised_by_its_step_or_by_the_batch_outside_training(reduction: str, window: int, own: int):
    reduced = []
    accelerator = SimpleNamespace(
        num_processes=2, reduce=lambda value, reduction: reduced.append(reduction) or 3 * value
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    counts = {"window_rows": torch.tensor(6), "window_tokens": torch.tensor(10)}
    assert loss_normalizer(counts, mask, reduction, accelerator).item() == window / 2
    assert loss_normalizer({}, mask, reduction, accelerator).item() == 3 * own / 2
    assert reduced == ["sum"]
