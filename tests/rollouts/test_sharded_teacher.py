"""A teacher that is sharded over processes is called by all of them equally often, whenever their rows finish."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT
from sharded_sampling import CASES, build_teacher, sample
from test_distributed import assert_same, run, train_distributed

from minillm_trl.models.teacher import is_sharded

SCRIPT = Path(__file__).parents[1].joinpath("sharded_sampling.py")


@pytest.mark.distributed
def test_processes_that_finish_at_different_steps_sample_as_with_a_whole_teacher(tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    lengths = []
    for rank in (0, 1):
        expected = [sample(rank, build_teacher(), *case) for case in CASES]
        assert torch.load(tmp_path / f"{rank}.pt") == expected
        lengths.append(max(len(completion) for each in expected[::2] for completion in each))  # in batches of two
    assert lengths[0] + 5 < lengths[1]  # the first process has long finished when the second samples its last token


@pytest.mark.distributed
def test_training_with_a_sharded_teacher_reaches_the_weights_of_training_with_a_whole_one(tmp_path: Path):
    options = {"teacher_mixed_alpha": 0.3, "shared_coins": False, "num_iterations": 2}
    reference = run(tmp_path, 8, 1, **options)
    assert_same(train_distributed(tmp_path, 2, 4, 1, {**options, "shard_teacher": True}), reference)


def test_whole_model_is_not_taken_for_a_sharded_one():
    assert not is_sharded(build_teacher())
