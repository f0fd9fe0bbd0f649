"""Run the tests that depend on other packages with their lowest and newest versions: `make test-matrix`.

Each environment has a Python and a virtual environment of its own. `lowest` pins the packages in `PINNED` to the lower
bounds of pyproject.toml, `newest` takes what pip finds. Run the same command to resume: files that passed with the
same versions and the same sources are not run again, unless you pass `--again`. Once all files of an environment have
run, the results are in `docs/version_matrix.json`, and docs/versions.md has its table, which a test compares.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
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


def fingerprint(test: str) -> str:
    """Return a hash of what the results of a test file depend on: the package, the helpers of tests, and the file."""
    helpers = (path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_"))
    paths = [*sorted((ROOT / "minillm_trl").rglob("*.py")), *sorted(helpers), ROOT / test]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def run_tests(python: Path, test: str) -> dict[str, int]:
    """Run a test file with the sources of this checkout, and return the numbers of pytest's last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", test]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stdout[-3000:], result.stderr[-1000:], sep="\n", file=sys.stderr, flush=True)
    last = (result.stdout.strip().splitlines() or [""])[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}


def passed(counts: dict[str, int]) -> bool:
    """Return whether tests ran, and none failed."""
    return counts.get("passed", 0) > 0 and counts.keys() <= {"passed", "skipped"}


def total(results: Iterable[dict[str, int]]) -> dict[str, int]:
    """Return the sum of the numbers of several files."""
    sums: dict[str, int] = {}
    for counts in results:
        for word, number in counts.items():
            sums[word] = sums.get(word, 0) + number
    return sums


def run_missing(python: Path, tests: list[str], kept: Path, again: bool) -> dict[str, dict[str, int]]:
    """Run the test files that have not passed yet; keep the result of each at once, so that a killed run resumes."""
    found = versions(python)
    done = json.loads(kept.read_text()) if kept.exists() and not again else {}
    if done.get("versions") != found:
        done = {"versions": found, "tests": {}}
    for test in tests:
        source = fingerprint(test)
        entry = done["tests"].get(test)
        if entry is None or entry["source"] != source or not passed(entry["result"]):
            done["tests"][test] = {"source": source, "result": run_tests(python, test)}
            kept.write_text(json.dumps(done))
            print(test, done["tests"][test]["result"], flush=True)
    return {test: done["tests"][test]["result"] for test in tests}


def record(name: str, entry: dict[str, object]) -> None:
    """Write the result of one environment next to that of the other."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**found, name: entry}, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PYTHONS), help="environments")
    parser.add_argument("--work", type=Path, default=ROOT / ".matrix", help="folder of the environments")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="some files, whose results are only printed")
    parser.add_argument("--installed", action="store_true", help="take the environments as they are")
    parser.add_argument("--again", action="store_true", help="run files that passed before, too")
    arguments = parser.parse_args()
    good = True
    for name in arguments.names:
        folder = arguments.work / name
        python = folder / "bin" / "python" if arguments.installed else make_environment(name, folder)
        results = run_missing(python, arguments.tests, arguments.work / f"{name}.json", arguments.again)
        counts = total(results.values())
        if {*results} == {*TESTS}:
            record(name, {"versions": versions(python), "tests": results, "result": counts})
        print(f"{name}: {counts}", flush=True)
        good = good and all(map(passed, results.values()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
