"""Claim: commands without training start in at most 4 CPU-seconds, with training about as fast as TRL's own.

    python benchmarks/startup.py [--repeats 3]

runs `minillm-trl SUBCOMMAND --help` for every subcommand, `compare` over results of two models, and `from trl import
GRPOConfig, ModelConfig`, which the options of a training command require. Writes `results/startup.json`: the user
CPU-seconds of each command, as minimum over the repeats, since other load only adds to them; and the slowest imports
(`python -X importtime`), in milliseconds with their own imports.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from measurement import write_record

from minillm_trl.cli import SUBCOMMANDS

TRAINING = ("sft", "kd", "seqkd", "minillm")
LIMIT = 4.0
TRL = "from trl import GRPOConfig, ModelConfig"
_IMPORT = re.compile(r"import time: +\d+ \| +(\d+) \|( +)([\w.]+)")
_SHOWN = 8


def cpu_seconds(command: list[str]) -> float:
    """Return the user CPU-seconds of a command and its child processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(command, capture_output=True, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def slowest_imports(words: list[str]) -> dict[str, float]:
    """Return the slowest imports of a command, without those nested in another listed import."""
    command = [sys.executable, "-X", "importtime", *words]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    found = [match for line in lines if (match := _IMPORT.match(line))]
    outermost = [match for match in found if len(match[2]) == 1]
    ranked = sorted(outermost, key=lambda match: int(match[1]), reverse=True)
    return {match[3]: int(match[1]) / 1000 for match in ranked[:_SHOWN]}


def write_runs(folder: Path) -> list[str]:
    """Write results of two models as `evaluate` does, for `compare`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from evaluation_results import write_results  # of the tests

    scores = [float(number % 7) for number in range(200)]
    runs = {"one": scores, "two": [score + 1 for score in scores]}
    return [str(write_results(folder / name, {"rouge_l": values})) for name, values in runs.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        commands = {f"{name} --help": ["-m", "minillm_trl", name, "--help"] for name in SUBCOMMANDS}
        commands["compare"] = ["-m", "minillm_trl", "compare", *write_runs(Path(folder))]
        commands["TRL's configurations"] = ["-c", TRL]
        results = {}
        for name, words in commands.items():
            seconds = min(cpu_seconds([sys.executable, *words]) for _ in range(repeats))
            limit = None if name.split()[0] in (*TRAINING, "TRL's") else LIMIT
            results[name] = {"cpu_seconds": round(seconds, 2), "limit": limit, "imports": slowest_imports(words)}
            print(f"{name:<22} {seconds:6.2f} s", "" if limit is None else f"of at most {limit:.0f}", flush=True)
    print(write_record("startup", ("torch", "transformers", "trl", "datasets", "peft"), {"repeats": repeats}, results))
    if late := [name for name, found in results.items() if found["limit"] and found["cpu_seconds"] > found["limit"]]:
        raise SystemExit(f"more than {LIMIT:.0f} CPU-seconds: {', '.join(late)}")


if __name__ == "__main__":
    main()
