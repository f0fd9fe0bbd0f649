"""The faults that the mutation sweep makes, and how it decides which tests have to see one."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
from mutants import apply, mutants
from mutation_sweep import covering_tests, markdown

SOURCE = '''
"""A module."""

def mean(values, mask, floor=1):
    """Mean where the mask is True."""
    if mask is None:
        raise ValueError(f"mask is {mask!r}")
    total = values.masked_fill(~mask, 0.0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=floor)
'''


def changed_to(operator: str) -> list[str]:
    return [mutant.after for mutant in mutants(SOURCE, "module") if mutant.id.split("::")[2] == operator]


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("negated comparison", ["mask is not None"]),
        ("condition always false", ["if False:\n    raise ValueError(f'mask is {mask!r}')"]),
        ("operation", ["total * mask.sum(dim=1).clamp(min=floor)"]),
        ("constant + 1", ["2", "2", "2"]),  # the floor and both dimensions
        ("constant", ["1.0"]),
        ("skipped method", ["values", "mask.sum(dim=1)"]),
        ("removed sign or negation", ["mask"]),
        ("swapped arguments", ["values.masked_fill(0.0, ~mask)"]),
        ("returned operand", ["return total", "return mask.sum(dim=1).clamp(min=floor)"]),
    ],
)
def test_faults_are_made_one_at_a_time(operator: str, expected: list[str]):
    assert changed_to(operator) == expected


def test_each_mutant_differs_from_the_source_in_its_place_alone():
    whole = ast.unparse(ast.parse(SOURCE))
    found = mutants(SOURCE, "module")
    assert len({mutant.id for mutant in found}) == len(found)
    for mutant in found:
        text = ast.unparse(apply(SOURCE, mutant))
        assert text != whole
        compile(text, "module", "exec")


def test_messages_docstrings_and_annotations_are_left_alone():
    source = 'def f(x: int = 0) -> "a":\n    """Add 1."""\n    logger.info(str(1))\n    raise ValueError(1 + x)\n'
    assert [mutant.after for mutant in mutants(source, "module")] == ["1"]  # of the default


def test_ids_outlive_edits_of_other_functions():
    before = {mutant.id: mutant.function_hash for mutant in mutants(SOURCE, "module")}
    after = {mutant.id: mutant.function_hash for mutant in mutants("x = 3 + 4\n" + SOURCE, "module")}
    assert before.items() <= after.items()


def test_tests_of_a_mutant_are_those_that_execute_its_lines_within_its_time():
    default, *_, last = mutants(SOURCE, "module")
    trace = {
        "slow": {"seconds": 2.0, "lines": {"module": [6, 8, 9]}},
        "quick": {"seconds": 1.0, "lines": {"module": [6, 8]}},
        "too long": {"seconds": 999.0, "lines": {"module": [9]}},
        "of another module": {"seconds": 0.1, "lines": {"other": [9]}},
    }
    assert covering_tests(default, "module", trace, Counter(), 45) == ["quick", "slow"]  # a default acts in the body
    assert covering_tests(default, "module", trace, Counter(slow=2), 45) == ["slow", "quick"]
    assert covering_tests(last, "module", trace, Counter(), 45) == ["slow"]


def test_every_test_of_a_module_runs_what_runs_at_its_import():
    source = "LIMIT = 3\nclass Options:\n    size: int = 4\n    def f(self, width=5):\n        return width * 6\n"
    places = {mutant.before: mutant.lines for mutant in mutants(source, "module") if "constant + 1" in mutant.id}
    everything = (1, 10**9)
    assert places == {"3": everything, "4": everything, "5": (5, 5), "6": (5, 5)}


def test_table_is_that_of_the_results_and_every_survivor_has_a_verdict():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "results" / "mutation_sweep.json").read_text())["results"]
    assert markdown(results) in (root / "CONTRIBUTING.md").read_text()
    assert all(entry.get("verdict") for entry in results.values() if entry["outcome"] != "killed")
