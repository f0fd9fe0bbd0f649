"""Results in a folder: computed once, kept with their settings, refused with other settings."""

from pathlib import Path

import pytest

from minillm_trl.errors import UserError
from minillm_trl.files.result_folder import ResultFolder


def folder_of(path: Path, **settings) -> ResultFolder:
    return ResultFolder(path, settings, "a run", "Name another folder.")


def test_result_is_computed_once_and_read_by_later_runs(tmp_path):
    results = folder_of(tmp_path / "run", seeds=(1, 2))
    assert not results.folder.exists()
    assert results.once("teacher/stage", lambda: {"loss": 1.5}) == {"loss": 1.5}
    again = folder_of(tmp_path / "run", seeds=[1, 2])  # JSON has no tuples
    assert again.once("teacher/stage", lambda: pytest.fail("computed again")) == {"loss": 1.5}
    assert again.get("student/stage") is None
    assert (tmp_path / "run" / "teacher" / "stage.json").is_file()


def test_result_without_content_is_a_result(tmp_path):
    folder_of(tmp_path).once("tokenizer", dict)
    assert folder_of(tmp_path).once("tokenizer", lambda: pytest.fail("computed again")) == {}


def test_failed_computation_leaves_no_result(tmp_path):
    results = folder_of(tmp_path)
    with pytest.raises(ZeroDivisionError):
        results.once("stage", lambda: 1 / 0)
    assert results.once("stage", lambda: {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(("changed", "was", "now"), [({"seed": 2}, "1", "2"), ({}, "1", "None")])
def test_other_settings_are_refused(tmp_path, changed, was, now):
    folder_of(tmp_path, seed=1).put("stage", {})
    with pytest.raises(UserError, match=rf"a run with seed={was}; now it is {now}\. Name another folder\."):
        folder_of(tmp_path, **changed)


def test_broken_settings_are_not_to_be_deleted_and_a_broken_result_is(tmp_path):
    folder_of(tmp_path, seed=1).put("stage", {})
    for name in ("stage", "settings"):
        (tmp_path / f"{name}.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json: .* Name another folder\."):
        folder_of(tmp_path, seed=1)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"stage\.json: .* Delete this file"):
        folder_of(tmp_path, seed=1).get("stage")
