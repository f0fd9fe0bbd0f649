"""What only a GPU can show, in one command and eight minutes: tests, update phase, decoding, precision, mixing.

    python benchmarks/gpu_run.py [--minutes 8] [--parts tests update_phase ...]

runs each part in a process of its own, in this order, with a limit of seconds. A part that is not finished at its
limit, or when the time is used up, is stopped. Parts write their own JSON to `results/gpu`, and what they print to
`runs/gpu/PART.log`. `results/gpu/gpu_run.json` lists the parts with their seconds and exit statuses; it is written
after each part, so an interruption keeps what was measured. The exit status is 1 if a part failed or was stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from measurement import ON_GPU, write_record

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 10  # a part is not started for less


class Part(NamedTuple):
    """A command and the seconds that it may take."""

    limit: float
    command: Sequence[str]


class Outcome(NamedTuple):
    """How a part ended: `"finished"`, `"failed"`, `"stopped"` at its limit, or `"not started"` for lack of time."""

    part: str
    outcome: str
    seconds: float


def _script(limit: float, name: str, *options: str) -> Part:
    return Part(limit, (f"benchmarks/{name}.py", *options))


PARTS = {
    "tests": Part(170, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/training/test_gpu.py")),
    "update_phase": _script(60, "update_phase", "--repeats", "5"),
    "decoding": _script(120, "hardware_limits", "--repeats", "3"),
    "precision": _script(120, "precision_seeds", "--first_updates", "24"),
    "speculative": _script(
        100, "speculative", "--teachers", "gpt2-large", "--kept", "0.7", "0.9", "--new_tokens", "64"
    ),
    "slots": _script(60, "slots", "--slots", "32", "--repeats", "2"),
}


def run_parts(parts: dict[str, Part], seconds: float, logs: Path) -> Iterator[Outcome]:
    """Run the parts one after the other, and yield how each ended.

    Args:
        parts: by name.
        seconds: time for all of them.
        logs: folder of what they print.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for name, part in parts.items():
        start = time.monotonic()
        limit = min(part.limit, end - start)
        if limit < min(LEAST_SECONDS, part.limit):
            yield Outcome(name, "not started", 0.0)
            continue
        outcome = _run(part.command, limit, logs / f"{name}.log")
        yield Outcome(name, outcome, round(time.monotonic() - start, 1))


def _run(command: Sequence[str], limit: float, log: Path) -> str:
    """Run a Python command with a limit of seconds, after which it and its processes are killed."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "finished" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.poll() is None:  # also when this script is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    arguments = parser.parse_args()
    if not ON_GPU:
        parser.error("there is no GPU to measure; each script runs on a CPU by itself")
    outcomes: list[Outcome] = []
    settings = {name: PARTS[name]._asdict() for name in arguments.parts}
    for found in run_parts({name: PARTS[name] for name in arguments.parts}, 60 * arguments.minutes, ROOT / "runs/gpu"):
        print(f"{found.part}: {found.outcome} after {found.seconds:g} s", flush=True)
        outcomes.append(found)
        results = [each._asdict() for each in outcomes]
        write_record("gpu_run", ("torch", "transformers", "trl"), settings, results)
    if any(each.outcome != "finished" for each in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
