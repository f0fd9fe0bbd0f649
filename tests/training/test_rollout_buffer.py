"""`RolloutBuffer`: which changes of a resumed run discard the rollouts of its checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_trainer import make_config

from minillm_trl.rollouts.buffer import pin_states
from minillm_trl.training.rollout_buffer import RolloutBuffer


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
