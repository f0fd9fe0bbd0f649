"""Run the tests that depend on TRL against several of its versions: `python tests/tools/trl_matrix.py 1.16.0 1.16.1`.

Each version is installed, without dependencies, into a separate folder that precedes the environment.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = [
    f"tests/method/test_{name}.py"
    for name in (
        *("trl_contract", "trl_version", "config", "trainer", "trainer_options", "trainer_gradient", "drop_in"),
        *("original_code", "language_modeling"),
    )
]


def available_versions(line: str) -> list[str]:
    """Return the releases of a minor version such as `1.16` on the package index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "trl"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listing)
    versions = found.group(1).split(", ") if found else []
    return sorted(version for version in versions if version.startswith(f"{line}."))


def run(version: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"trl=={version}",
        ]
        subprocess.run(install, check=True)
        path = os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--tb=line", *TESTS]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="versions of TRL; by default all releases of the tested lines")
    versions = parser.parse_args().versions
    if not versions:
        sys.path.insert(0, str(ROOT))
        from minillm_trl.training.trl_version import TESTED

        versions = [version for line in TESTED for version in available_versions(line)]
    results = {version: run(version) for version in versions}
    for version, passed in results.items():
        print(f"trl {version}: {'passed' if passed else 'FAILED'}")
    return 0 if results and all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
