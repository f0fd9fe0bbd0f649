"""An untested version of TRL is met at import, not by a wrong loss."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minillm_trl.training.trl_version import TESTED, check_trl_version

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("installed", ["2.0.0", "0.29.1", "1.14.2", "1.15.0"])
def test_other_major_and_older_versions_are_refused(installed: str):
    with pytest.raises(ImportError, match=rf"tested with TRL .*installed is {installed}\. Install a tested one"):
        check_trl_version(installed)


@pytest.mark.parametrize("installed", ["1.99.0", "1.99.0.dev0"])
def test_newer_minor_version_is_warned_of(installed: str):
    with pytest.warns(UserWarning, match=f"installed is {installed}"):
        check_trl_version(installed)


def test_tested_versions_pass_in_silence(recwarn: pytest.WarningsRecorder):
    for version in TESTED:
        check_trl_version(f"{version}.0")
    assert len(recwarn) == 0


def test_package_requires_what_is_tested():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (trl,) = [each for each in dependencies if each.startswith("trl")]
    major, minor = TESTED[-1].split(".")
    assert trl == f"trl>={TESTED[0]},<{major}.{int(minor) + 1}"


@pytest.mark.cli
def test_import_of_the_package_checks_the_version():
    code = (
        "import importlib.metadata as m; real = m.version; "
        "m.version = lambda package: '2.0.0' if package == 'trl' else real(package); "
        "import minillm_trl.trainer"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "ImportError: minillm_trl is tested with TRL" in result.stderr
