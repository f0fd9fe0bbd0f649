"""Shared by the benchmarks: GPT-2 shapes with random weights, timing, and the record of a result."""

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

RESULTS = Path(__file__).with_name("results")
PERCENTILES = (20, 50, 80)

# 124M, 355M, 774M and 1.5B parameters, and a tiny one for trying out a benchmark
SHAPES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.float16 if ON_GPU else torch.float32

# As the trainers do; minillm_trl is not installed in the environment of TRL 1.14. cuDNN's attention would prepare
# itself again for each length, which makes the first rollout of a shape several times slower.
torch.backends.cuda.enable_cudnn_sdp(False)


def build(name: str, dtype: torch.dtype = DTYPE) -> PreTrainedModel:
    """Build a GPT-2 of the named shape with random weights, in eval mode."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return GPT2LMHeadModel(GPT2Config(**SHAPES[name])).to(dtype).eval()


def parameter_ratio(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    return teacher.num_parameters() / student.num_parameters()


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    start = clock()
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes() -> int:
    """Return the peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bytes_before() -> int:
    """Return the baseline for [`peak_bytes`]; on a GPU, reset the peak to the memory allocated now."""
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    return peak_bytes()


def in_own_process(measure: Callable[..., Any], *words: object) -> Any:
    """Call `measure(*words)`; on a CPU in a new process (`--measure WORDS`), to get its own peak memory."""
    if ON_GPU:
        return measure(*words)
    command = [sys.executable, sys.argv[0], "--measure", *map(str, words)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, float]]:
    """Return seconds of each function in each round. They alternate, so that noise affects all of them equally.

    A warm-up round comes first and is not returned. On a busy machine, `clock=time.process_time` with a single thread
    counts the seconds of this process alone.
    """
    rounds = [{name: seconds(function, clock) for name, function in functions.items()} for _ in range(repeats + 1)]
    return rounds[1:]


def cpu_clock() -> Callable[[], float]:
    """Return the clock for [`alternate`]: of this process, limited to one thread, on a CPU; the wall's on a GPU."""
    if ON_GPU:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def percentiles(values: Sequence[float]) -> list[float]:
    """Return the 20th, 50th and 80th percentile."""
    return np.percentile(values, PERCENTILES).tolist()


def size_arguments(description: str) -> argparse.Namespace:
    """Return the options of a benchmark over several sizes of teachers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2")
    parser.add_argument("--teachers", choices=SHAPES, nargs="+", default=["gpt2-large", "gpt2-xl"])
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


def speedup_over(
    rounds: list[dict[str, float]], slow: str, student: str, teacher: str, ratio: float
) -> dict[str, Any]:
    """Return and print the result of one size: how many times faster `"ours"` is than `slow`."""
    speedup = percentiles([times[slow] / times["ours"] for times in rounds])
    print(f"{teacher} ({ratio:.1f}x): {speedup[1]:.2f}x [{speedup[0]:.2f}, {speedup[2]:.2f}]", flush=True)
    return {"student": student, "teacher": teacher, "parameter_ratio": ratio, "speedup": speedup}


def commit() -> str:
    """Return the current commit."""
    revision = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    return subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, Any]:
    facts = {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if ON_GPU:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        facts |= {"memory": torch.cuda.get_device_properties().total_memory, "driver": driver}
        facts["cuda"] = torch.version.cuda
    return facts


def given_command(paths: Sequence[str]) -> str:
    """Return the command that runs now, with PATH for the values of the options in `paths`, which are private."""
    words = list(sys.argv[1:])
    for position, word in enumerate(words):
        option, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--") and option in paths:
            if equals:
                words[position] = f"--{option}=PATH"
            else:
                words[position + 1] = "PATH"
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def write_record(
    name: str, packages: Sequence[str], settings: dict[str, Any], results: Any, command: str | None = None
) -> Path:
    """Write `results/<name>.json`, on a GPU `results/gpu/<name>.json`.

    The file also has the command, commit, machine and versions of the measurement.

    Pass `command` if the command line has private folders (see [`given_command`]), or if several commands ran.
    """
    record = {
        "command": command or given_command(()),
        "commit": commit(),
        "machine": machine(),
        "versions": {package: version(package) for package in packages},
        "settings": settings,
        "percentiles": PERCENTILES,
        "results": results,
    }
    path = (RESULTS / "gpu" if ON_GPU else RESULTS) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
