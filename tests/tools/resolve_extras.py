"""Check that pip finds versions for the package and each extra: `python tests/tools/resolve_extras.py [EXTRA ...]`.

Nothing is installed. pip reads the metadata of packages, and downloads those that have none on the index.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "deepspeed", "aiohttp", "openai")


def resolve(extra: str) -> dict[str, str] | None:
    """Return the versions that pip would install into an empty environment; None if there are none."""
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    result = subprocess.run([*command, target], capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stderr, file=sys.stderr)
        return None
    packages = [item["metadata"] for item in json.loads(result.stdout)["install"]]
    return {package["name"].lower(): package["version"] for package in packages}


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", default=["", *project["optional-dependencies"]])
    failed = []
    for extra in parser.parse_args().extras:
        found = resolve(extra)
        if found is None:
            failed.append(extra)
        else:
            versions = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
            print(f"{extra or 'no extra'}: {len(found)} packages, {versions}", flush=True)
    if failed:
        print(f"cannot be resolved: {', '.join(name or 'no extra' for name in failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
