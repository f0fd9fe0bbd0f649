"""`RolloutBuffer`: which changes of a resumed run discard the rollouts of its checkpoint."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_trainer import make_config

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
