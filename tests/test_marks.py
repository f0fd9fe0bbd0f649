"""`make test` stays quick: what starts processes is marked, and slow unless it is a smoke test."""

import subprocess
import sys

import pytest
from conftest import marks


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
