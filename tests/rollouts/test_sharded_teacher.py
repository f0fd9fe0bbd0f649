"""A teacher that is sharded over processes is called by all of them equally often, whenever their rows finish."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT
from sharded_sampling import CASES, ROWS, build_teacher, sample
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
        expected = [sample(rank, build_teacher(), *case, rows[rank]) for case, rows in product(CASES, ROWS)]
        assert torch.load(tmp_path / f"{rank}.pt") == expected
        lengths.append(max(map(len, expected[0])))  # in batches of two
    assert lengths[0] + 5 < lengths[1]  # the first process has long finished when the second samples its last token
    of_tools = (torch.load(tmp_path / f"tools-{rank}.pt") for rank in (0, 1))
    whole, sharded_teacher, sharded_student = zip(*of_tools, strict=True)
    assert [process["rows"] for process in whole] == [[2, 2, 1, 2, 1], [2, 2, 2, 1]]
    for one, other in zip(whole, sharded_teacher, strict=True):
        assert one["rows"] == other["rows"]
        assert one["completions"][0] == other["completions"][0]
        assert one["losses"][0] == pytest.approx(other["losses"][0], rel=1e-4)
    for one, other in zip(sharded_student, sharded_teacher, strict=True):
        assert one["rows"] == other["rows"]
        assert one["completions"] == other["completions"]  # where both sample, as long on both
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)


@pytest.mark.distributed
def test_training_with_a_sharded_teacher_reaches_the_weights_of_training_with_a_whole_one(tmp_path: Path):
    options = {"teacher_mixed_alpha": 0.3, "shared_coins": False, "num_iterations": 2}
    reference = run(tmp_path, 8, 1, **options)
    assert_same(train_distributed(tmp_path, 2, 4, 1, {**options, "shard_teacher": True}), reference)


def test_whole_model_is_not_taken_for_a_sharded_one():
    assert not is_sharded(build_teacher())
