"""Check that pip finds versions for the package and each extra: `make resolve`, or `resolve_extras.py [EXTRA ...]`.

Each is resolved for an empty environment, with the lowest and with the newest transformers that pyproject.toml
accepts. If one of them fails, pip's reason is kept, and the extra is resolved with any transformers, as a user would.
Then the package is resolved for two environments that have TRL and one of these versions of transformers, neither of
which may change. All of these are dry runs with the newest pip, which reads the metadata of packages and seldom
downloads one. The results are in `docs/resolved_versions.json`, and docs/versions.md has their table, which a test
compares.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.version import Version
from version_matrix import ROOT, lower_bounds

RESULTS = ROOT / "docs" / "resolved_versions.json"
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "deepspeed", "aiohttp", "openai")
NO_EXTRA = "no extra"
ANY = "any"
Found = dict[str, str] | list[str]


def make_environment(folder: Path) -> Path:
    """Make an empty environment with the newest pip, and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    return python


def resolve(python: Path, target: str, *more: str) -> Found:
    """Return the versions that pip would install, or the lines of its reason if there are none."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [python, "-m", "pip", "install", "--dry-run", "--report", report.name, *more, target]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            packages = [item["metadata"] for item in json.loads(Path(report.name).read_text())["install"]]
            return {package["name"].lower(): package["version"] for package in packages}
    cause = re.search(r"The conflict is caused by:\n(.*?)\n\n", result.stdout, re.DOTALL)
    lines = cause.group(1).splitlines() if cause else result.stderr.splitlines()
    return [line.strip() for line in lines]


def resolve_extra(python: Path, extra: str, transformers: str) -> dict[str, object]:
    """Return how many packages an extra needs with a version of transformers, and the versions of the main ones."""
    target = str(ROOT) if extra == NO_EXTRA else f"{ROOT}[{extra}]"
    pin = [] if transformers == ANY else [f"transformers=={transformers}"]
    found = resolve(python, target, "--ignore-installed", *pin)
    if isinstance(found, list):
        return {"packages": None, "conflict": found}
    return {"packages": len(found), **{name: found[name] for name in SHOWN if name in found}}


def resolve_beside_trl(transformers: str) -> dict[str, object]:
    """Return what pip would add to an environment with TRL and a version of transformers."""
    trl = lower_bounds()["trl"]
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder))
        # without their dependencies, whose versions no one has chosen
        wanted = [f"trl=={trl}", f"transformers=={transformers}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=True)
        found = resolve(python, str(ROOT))
    if isinstance(found, list):
        return {"trl": trl, "changed": None, "conflict": found}
    return {"trl": trl, "changed": sorted(found.keys() & {"trl", "transformers"}), "added": len(found)}


def pip_version(python: Path) -> str:
    """Return the version of an environment's pip."""
    words = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout
    return words.split()[1]


def ends_of_transformers(python: Path) -> list[str]:
    """Return the lowest version that the package accepts, and the newest as pip chooses it."""
    found = resolve(python, str(ROOT), "--ignore-installed")
    assert isinstance(found, dict), f"the package cannot be resolved: {found}"
    lowest = ".".join(map(str, (*Version(lower_bounds()["transformers"]).release, 0)[:3]))
    return [lowest, found["transformers"]]


def main() -> int:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", default=[NO_EXTRA, *extras])
    chosen = parser.parse_args().extras
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"extras": {}}
    good = True
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder))
        ends = ends_of_transformers(python)
        results |= {"python": platform.python_version(), "pip": pip_version(python), "transformers": ends}
        results["beside_trl"] = {version: resolve_beside_trl(version) for version in ends}
        print("beside TRL", results["beside_trl"], flush=True)
        for extra in chosen:
            found = {version: resolve_extra(python, extra, version) for version in ends}
            if not all(entry["packages"] for entry in found.values()):
                found[ANY] = resolve_extra(python, extra, ANY)
            print(extra, found, flush=True)
            good = good and any(entry["packages"] for entry in found.values())
            results["extras"][extra] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good and all(entry["changed"] == [] for entry in results["beside_trl"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
