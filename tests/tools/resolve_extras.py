"""Check that pip finds versions for the package and each extra: `make resolve`, or `resolve_extras.py [EXTRA ...]`.

Each is resolved for an empty environment, with the lowest and with the newest transformers that pyproject.toml
accepts. Then the package is resolved for two environments that have TRL and one of these versions of transformers,
neither of which may change. All of these are dry runs: pip reads the metadata of packages, and downloads those that
have none on the index. The results are written to `docs/resolved_versions.json`.
"""

import argparse
import json
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


def resolve(python: Path, target: str, *more: str) -> dict[str, str] | None:
    """Return the versions that pip would install; None, with pip's words on stderr, if there are none."""
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *more, target]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        words = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        print(target, *more, *words, sep="\n", file=sys.stderr)
        return None
    packages = [item["metadata"] for item in json.loads(result.stdout)["install"]]
    return {package["name"].lower(): package["version"] for package in packages}


def newest_transformers(python: Path) -> str:
    """Return the newest version that the package accepts, as pip chooses it."""
    found = resolve(python, str(ROOT), "--ignore-installed")
    assert found is not None, "the package cannot be resolved"
    return found["transformers"]


def resolve_extra(extra: str, transformers: str) -> dict[str, object]:
    """Return how many packages an extra needs with a version of transformers, and the versions of the main ones."""
    target = str(ROOT) if extra == NO_EXTRA else f"{ROOT}[{extra}]"
    found = resolve(Path(sys.executable), target, "--ignore-installed", f"transformers=={transformers}")
    if found is None:
        return {"packages": None}
    return {"packages": len(found), **{name: found[name] for name in SHOWN if name in found}}


def resolve_beside_trl(transformers: str) -> dict[str, object]:
    """Return what pip would add to an environment with TRL and a version of transformers."""
    trl = lower_bounds()["trl"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        # without their dependencies, whose versions no one has chosen
        wanted = [f"trl=={trl}", f"transformers=={transformers}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=True)
        found = resolve(python, str(ROOT))
    changed = None if found is None else sorted(found.keys() & {"trl", "transformers"})
    return {"trl": trl, "changed": changed, "added": None if found is None else len(found)}


def main() -> int:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", default=[NO_EXTRA, *extras])
    chosen = parser.parse_args().extras
    lowest = ".".join(map(str, (*Version(lower_bounds()["transformers"]).release, 0)[:3]))
    ends = [lowest, newest_transformers(Path(sys.executable))]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"extras": {}}
    good = True
    results["beside_trl"] = {version: resolve_beside_trl(version) for version in ends}
    print("beside TRL", results["beside_trl"], flush=True)
    for extra in chosen:
        results["extras"][extra] = found = {version: resolve_extra(extra, version) for version in ends}
        print(extra, found, flush=True)
        good = good and any(entry["packages"] for entry in found.values())
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good and all(entry["changed"] == [] for entry in results["beside_trl"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
