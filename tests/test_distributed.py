"""Two processes reach the weights and log the metrics of one process on the same rollouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_run.py")


def train(output: Path, processes: int, accumulation: int, reduction: str) -> dict:
    output.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
            *(str(SCRIPT), str(output), str(accumulation), reduction),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output / "result.pt", weights_only=False)


@pytest.mark.distributed
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path: Path, reduction: str):
    one = train(tmp_path / "one", processes=1, accumulation=2, reduction=reduction)
    two = train(tmp_path / "two", processes=2, accumulation=1, reduction=reduction)
    assert (two["moved"] - one["moved"]).norm() < 1e-4 * one["moved"].norm()
    steps = [entry for entry in one["history"] if "loss" in entry]
    lengths = [entry for entry in steps if "completions/min_length" in entry]
    assert any(entry["completions/min_length"] < entry["completions/max_length"] for entry in lengths)
    for name in ("entropy", "rollout/eos_rate", "completions/mean_length"):
        first, second = (next(e[name] for e in each["history"] if name in e) for each in (one, two))
        assert second == pytest.approx(first, rel=1e-2)
