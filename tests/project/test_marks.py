"""`make test` stays quick: what starts processes is marked, and slow unless it is a smoke test."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import marks

ROOT = Path(__file__).parents[2]
TESTS = (
    "baselines",
    "cli",
    "data",
    "engines",
    "evaluation",
    "method",
    "models",
    "project",
    "rollouts",
    "tools",
    "training",
)
FOLDERS = (
    "tests",
    *(f"tests/{name}" for name in TESTS),
    "benchmarks",
    "benchmarks/quality",
    "docs/figures",
    "docs/mkdocs",
)


def test_unmarked_test_cannot_start_python():
    with pytest.raises(pytest.fail.Exception, match="mark the test"):
        subprocess.run([sys.executable, "-c", ""])


@pytest.mark.cli
def test_marked_test_is_slow_and_can(request: pytest.FixtureRequest):
    assert "slow" in marks(request.node)
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.cli
@pytest.mark.smoke
def test_smoke_test_is_not_slow_and_can(request: pytest.FixtureRequest):
    assert "slow" not in marks(request.node)
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_scripts_that_tests_import_have_names_of_their_own():
    """All these folders are on `sys.path`, in an order that depends on which tests run."""
    names = Counter(path.stem for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
    assert {name for name, count in names.items() if count > 1} - {"__init__"} == set()
