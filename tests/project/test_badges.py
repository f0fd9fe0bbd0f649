"""The badges of the notebooks: where they lead, and that a second run replaces them."""

import json
import shutil
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import badges  # noqa: E402 - lies in notebooks/, which is no package

ADDRESS = "https://github.com/someone/some.thing"


@pytest.mark.parametrize("address", [ADDRESS, f"{ADDRESS}/", f"{ADDRESS}.git"])
def test_badges_lead_to_the_notebook_on_both_services(address: str):
    line = badges.badges(address, "v1", "01_a.ipynb")
    place = "someone/some.thing/blob/v1/notebooks/01_a.ipynb"
    assert f"(https://colab.research.google.com/github/{place})" in line
    assert f"(https://kaggle.com/kernels/welcome?src=https://github.com/{place})" in line


@pytest.mark.parametrize("address", ["https://gitlab.com/a/b", "github.com/a/b", "https://github.com/a"])
def test_other_addresses_are_refused(address: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["badges.py", address])
    with pytest.raises(SystemExit):
        badges.main()
    assert "is no address like https://github.com/OWNER/REPOSITORY" in capsys.readouterr().err


def test_notebooks_change_by_their_badges_alone(tmp_path, monkeypatch):
    originals = sorted(NOTEBOOKS.glob("*.ipynb"))
    for original in originals:
        shutil.copy(original, tmp_path)
    monkeypatch.setattr(badges, "FOLDER", tmp_path)
    for branch in ("old", "main"):
        monkeypatch.setattr(sys, "argv", ["badges.py", ADDRESS, "--branch", branch])
        badges.main()
    for original in originals:
        lines = (tmp_path / original.name).read_text().splitlines()
        expected = original.read_text().splitlines()
        added = [line for line in lines if line not in expected]
        assert len(lines) == len(expected) + 2
        assert len(added) == 1
        assert json.loads(added[0].strip().rstrip(",")) == badges.badges(ADDRESS, "main", original.name) + "\n"
