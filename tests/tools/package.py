"""Build wheel and sdist, check them, and run the demo from the installed wheel: `make package`.

The wheel is built from the sdist, installed into a fresh environment outside of the checkout, and `minillm-trl demo
--quick` runs there. `--packages ENVIRONMENT` takes the dependencies from an existing environment instead of
installing them. `--no_demo` stops after a recipe, a launch configuration and the help were found.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = (
    "minillm_trl/recipes/e2e_demo/minillm.yaml",
    "minillm_trl/data/e2e_nlg/test.jsonl.gz",
    "minillm_trl/py.typed",
)


def run(*words: object, **options: object) -> None:
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, **options)


def build(folder: Path) -> Path:
    """Build the sdist and, from it, the wheel; check both; return the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir())
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if name not in names]
    assert not missing, f"{wheel.name} lacks {missing}"
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))], "the wheel has other folders"
    return wheel


def install(wheel: Path, folder: Path, packages: Path | None) -> Path:
    """Install the wheel into a fresh environment, and return its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    command = [programs / "python", "-m", "pip", "install", "--quiet"]
    if packages is None:
        run(*command, wheel)
        return programs
    run(*command, "--no-deps", wheel)
    found = subprocess.run(
        [packages / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{found}\n")  # searched after the environment's own packages
    return programs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="environment with the dependencies")
    parser.add_argument("--no_demo", action="store_true", help="do not run the demo")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of wheel and sdist")
    arguments = parser.parse_args()
    arguments.output.mkdir(exist_ok=True)
    for old in arguments.output.glob("minillm_trl-*"):
        old.unlink()
    wheel = build(arguments.output)
    with tempfile.TemporaryDirectory() as work:
        programs = install(wheel, Path(work) / "environment", arguments.packages)
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = {"cwd": work, "env": {**variables, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}}
        code = "import minillm_trl; print(minillm_trl.__file__, minillm_trl.__version__)"
        run(programs / "python", "-c", code, **options)
        run(programs / "minillm-trl", "recipe", "dolly_toy", "--list", **options)
        run(programs / "minillm-trl", "minillm", "--help", **{**options, "stdout": subprocess.DEVNULL})
        if not arguments.no_demo:
            run(programs / "minillm-trl", "demo", "--quick", "--output_dir", "demo", **options)
            assert (Path(work) / "demo" / "report.md").is_file()
    print("The wheel and the sdist are fine.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
