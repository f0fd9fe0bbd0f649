"""How long does `minillm-trl demo --models smollm2` take, and how much memory?

    python benchmarks/real/demo_time.py [--teacher FOLDER] [--dolly FILE] [--folder runs/demo-smollm2]

Runs the demo in a new folder, on an otherwise idle machine, and writes `results/real_demo.json`: the seconds of the
whole run and of its training stages, and the peak memory. Memory is the proportional set size of the process and all
of its children, sampled every three seconds, so that pages they share count once. Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `measurement`

PACKAGES = ("torch", "transformers", "trl", "accelerate", "minillm-trl")
SECONDS_BETWEEN_SAMPLES = 3


def memory_of(process: int) -> int:
    """Return the proportional set size of a process and its children in bytes; 0 for one that has ended."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        (kilobytes,) = re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError, ValueError):  # it ends while it is read
        return 0
    return int(kilobytes) * 1024 + sum(memory_of(int(child)) for child in children)


def measure(words: list[str]) -> dict[str, Any]:
    """Run a command; return its seconds and its peak memory in bytes.

    Raises:
        CalledProcessError: if it fails.
    """
    started, peak, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(words)

    def sample() -> None:
        nonlocal peak
        while not ended.wait(SECONDS_BETWEEN_SAMPLES):
            peak = max(peak, memory_of(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    sampler.join()
    if status != 0:
        raise subprocess.CalledProcessError(status, words)
    return {"seconds": seconds, "peak_bytes": peak}


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of the training stages of a finished demo."""
    records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/smollm2/*/run.json")}
    found = {
        stage: record["attempts"][-1]["seconds"]["total"]
        for stage, record in records.items()
        if record["subcommand"] in ("seqkd", "kd", "sft", "minillm")
    }
    return {stage: found[stage] for stage in ("answers", "heal", "sft", "minillm")}


def main() -> None:
    from measurement import write_record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="name or folder (default: from the hub)")
    parser.add_argument("--dolly", help="local copy of databricks-dolly-15k.jsonl (default: from the hub)")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-smollm2"), help="a folder that does not exist")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"--folder {arguments.folder} exists, so finished stages would be skipped. Name another one.")
    words = [sys.executable, "-m", "minillm_trl", "demo", "--models", "smollm2", "--output_dir", str(arguments.folder)]
    for name in ("teacher", "dolly"):
        if value := getattr(arguments, name):
            words += [f"--{name}", value]
    results = {**measure(words), "stages": stage_seconds(arguments.folder)}
    write_record("real_demo", PACKAGES, {}, results, "python benchmarks/real/demo_time.py")


if __name__ == "__main__":
    main()
