"""Run the tests that depend on other packages with their lowest and newest versions: `make test-matrix`.

Each environment has a Python and a virtual environment of its own. `lowest` pins the packages in `PINNED` to the lower
bounds of pyproject.toml, `newest` takes what pip finds. The results are in `docs/version_matrix.json`,
and docs/versions.md has its table, which a test compares.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "version_matrix.json"
PINNED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
SHOWN = (*PINNED, "tokenizers", "huggingface_hub", "numpy", "aiohttp")
PYTHONS = {"lowest": "python3.11", "newest": "python3.13"}
# Tests that use other packages: private names, models, data, whole runs and how they resume, the command line
_FILES = {
    "baselines": "kd seqkd",
    "cli": "cli errors merge options push startup",
    "data": "conversations data input_files mixtures",
    "evaluation": "divergence evaluate_command evaluation",
    "method": "config drop_in language_modeling mixed_precision reference trained_weights trainer trainer_gradient "
    "trainer_options trl_contract trl_version",
    "models": "adapters chat_commands encoding end_tokens families fused_head multimodal safety shrink teacher "
    "weight_formats",
    "rollouts": "logits_processor rollout_sampler rollout_scores sampling speculative tool_scores",
    "teacher_server": "protocol remote_teacher serve_teacher top_k",
    "training": "ends_of_run reliable_runs resumed_settings rollout_buffer run_record",
}
TESTS = tuple(f"tests/{folder}/test_{name}.py" for folder, names in _FILES.items() for name in names.split())


def lower_bounds() -> dict[str, str]:
    """Return the lowest version of each package in `PINNED`, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {each.name: each for each in map(Requirement, project["dependencies"])}
    return {name: next(part.version for part in required[name].specifier if part.operator == ">=") for name in PINNED}


def make_environment(name: str, folder: Path) -> Path:
    """Make a virtual environment with the package, unless the folder has one, and return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([PYTHONS[name], "-m", "venv", folder], check=True)
    pins = [f"{package}=={version}" for package, version in lower_bounds().items()] if name == "lowest" else []
    command = [python, "-m", "pip", "install", "--quiet", "pytest>=8", *pins, f"{ROOT}[server]"]
    subprocess.run(command, check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of Python and of the packages in `SHOWN`."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "found = {'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}; "
        "print(json.dumps(found))"
    )
    result = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def run_tests(python: Path, tests: list[str]) -> dict[str, int]:
    """Run the tests with the sources of this checkout, and return the numbers of pytest's last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", *tests]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(result.stdout[-3000:], file=sys.stderr)
    last = result.stdout.strip().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}


def record(name: str, entry: dict[str, object]) -> None:
    """Write the result of one environment next to that of the other."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**found, name: entry}, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PYTHONS), help="environments")
    parser.add_argument("--work", type=Path, default=ROOT / ".matrix", help="folder of the environments")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--installed", action="store_true", help="take the environments as they are")
    arguments = parser.parse_args()
    good = True
    for name in arguments.names:
        folder = arguments.work / name
        python = folder / "bin" / "python" if arguments.installed else make_environment(name, folder)
        counts = run_tests(python, arguments.tests)
        record(name, {"versions": versions(python), "tests": arguments.tests, "result": counts})
        print(f"{name}: {counts}")
        good = good and counts.keys() <= {"passed", "skipped"}
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
