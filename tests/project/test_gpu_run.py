"""The run of all benchmarks on a GPU: its parts keep their limits, and one that fails does not stop the others."""

import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_run  # noqa: E402 - lies in benchmarks/, which is no package
from gpu_run import PARTS, Part, run_parts  # noqa: E402


def outcomes(parts: dict[str, Part], seconds: float, logs: Path) -> dict[str, str]:
    return {found.part: found.outcome for found in run_parts(parts, seconds, logs)}


@pytest.mark.slow
def test_parts_finish_fail_and_are_stopped_independently(tmp_path):
    sleeps = tmp_path / "slept"
    child = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(sleeps)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parts = {
        "good": Part(30, ("-c", "print('measured')")),
        "bad": Part(30, ("-c", "raise SystemExit(3)")),
        "slow": Part(1, ("-c", code)),
        "next": Part(30, ("-c", "")),
    }
    expected = {"good": "finished", "bad": "failed", "slow": "stopped", "next": "finished"}
    assert outcomes(parts, 120, tmp_path / "logs") == expected
    assert (tmp_path / "logs" / "good.log").read_text() == "measured\n"
    time.sleep(2)
    assert not sleeps.exists()  # the processes of a stopped part are gone too


def test_parts_without_time_are_not_started(tmp_path):
    started = tmp_path / "started"
    touch = f"import pathlib; pathlib.Path({str(started)!r}).touch()"
    assert outcomes({"late": Part(60, ("-c", touch))}, gpu_run.LEAST_SECONDS - 1, tmp_path) == {"late": "not started"}
    assert not started.exists()


@pytest.mark.parametrize("name", PARTS)
def test_commands_of_the_parts_are_accepted(name: str, monkeypatch, capsys):
    """Their options are those of the scripts."""
    command = PARTS[name].command
    if command[0] == "-m":
        assert (BENCHMARKS.parent / command[-1]).is_file()
        return
    script = BENCHMARKS.parent / command[0]
    monkeypatch.setattr(sys, "argv", [str(script), *command[1:], "--help"])
    module = __import__(script.stem)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in command if option.startswith("--"))


def test_limits_of_the_parts_fit_the_time():
    assert sum(part.limit for part in PARTS.values()) <= 11 * 60
    assert all(part.limit >= gpu_run.LEAST_SECONDS for part in PARTS.values())
