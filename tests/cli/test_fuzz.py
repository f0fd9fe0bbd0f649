"""Some bad inputs of each kind; `python tests/tools/fuzzing.py --number 10000` tries more."""

import os
from pathlib import Path

import pytest
from fuzzing import KINDS, try_input

# as many as take about two seconds; what reads a table or a model takes longer than what reads a line
NUMBERS = dict.fromkeys(KINDS, 40) | {"model_folder": 12, "evaluation_results": 25, "yaml_file": 25}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_explained_and_leaves_nothing_half_done(kind: str, tmp_path):
    problems = {}
    ended = []
    for number in range(NUMBERS[kind]):
        end, problem = try_input(kind, 0, number, tmp_path)
        ended.append(end)
        if problem is not None:
            problems[number] = problem
    assert problems == {}
    assert "refused" in ended


def test_environment_is_as_it_was(tmp_path):
    before = dict(os.environ), Path.cwd()
    try_input("yaml_file", 0, 0, tmp_path)
    assert (dict(os.environ), Path.cwd()) == before
    assert list(tmp_path.iterdir()) == []
