"""The faults that the mutation sweep makes, and how it decides which tests have to see one."""

import ast
import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mutation_trace
import pytest
from mutants import Mutant, apply, mutants
from mutation_forks import Job, LoadedFunctions, in_forks
from mutation_results import markdown, read, read_faults, write
from mutation_trace import Tracer, covering_tests

pytest_plugins = ["pytester"]

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


def test_a_shared_fixture_counts_once_and_its_tests_come_together():
    *_, last = mutants(SOURCE, "module")

    def entry(seconds: float, **fixtures: float) -> dict:
        return {"seconds": seconds, "fixtures": fixtures, "lines": {"module": [9]}}

    trace = {"a": entry(0.1, run=5.0), "b": entry(1.0), "c": entry(0.2, run=5.0), "d": entry(0.3, other=9.0)}
    assert covering_tests(last, "module", trace, Counter(), 6.4) == ["b", "a", "c"]
    assert covering_tests(last, "module", trace, Counter(c=9), 6.4) == ["c", "a", "b"]
    assert covering_tests(last, "module", trace, Counter(), 6.2) == ["b", "a"]


def test_variants_of_a_test_come_after_other_tests():
    *_, last = mutants(SOURCE, "module")
    trace = {
        name: {"seconds": seconds, "lines": {"module": [9]}}
        for name, seconds in {"a[0]": 1.0, "a[1]": 1.1, "a[2]": 1.2, "b": 2.0, "c": 3.0}.items()
    }
    assert covering_tests(last, "module", trace, Counter(), 45) == ["a[0]", "b", "a[1]", "c", "a[2]"]


def test_time_of_a_shared_fixture_is_told_from_that_of_its_tests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    clock = SimpleNamespace(process_time=lambda: getattr(sys.modules.get("measured"), "now", 0.0))
    monkeypatch.setattr(mutation_trace, "time", clock)
    pytester.makepyfile(
        measured="now = 0.0\ndef wait():\n    global now\n    now += 5.0\n",
        test_it="""
            import threading
            import pytest
            import measured

            @pytest.fixture(scope="module", params=[0, 1])
            def run(request):
                measured.wait()

            def test_first(run): pass
            def test_second(run): pass
            def test_own(): measured.wait()
            def test_thread():
                thread = threading.Thread(target=measured.wait)
                thread.start()
                thread.join()
        """,
    )
    tracer = Tracer({"measured": pytester.path / "measured.py"})
    assert pytester.inline_run("-p", "no:cacheprovider", plugins=[tracer]).ret == 0
    found = {name.partition("::")[2]: entry for name, entry in tracer.found.items()}
    assert all(entry["lines"] == {"measured": [4]} for entry in found.values())
    seconds = {name: (entry["seconds"], list(entry["fixtures"].values())) for name, entry in found.items()}
    shared = {f"test_{test}[{value}]": (0.0, [5.0]) for test in ("first", "second") for value in (0, 1)}
    assert seconds == shared | {"test_own": (5.0, []), "test_thread": (5.0, [])}
    keys = [set(found[f"test_{test}"]["fixtures"]) for test in ("first[0]", "second[0]", "first[1]")]
    assert keys[0] == keys[1] != keys[2]


def test_every_test_of_a_module_runs_what_runs_at_its_import():
    source = "LIMIT = 3\nclass Options:\n    size: int = 4\n    def f(self, width=5):\n        return width * 6\n"
    places = {mutant.before: mutant.lines for mutant in mutants(source, "module") if "constant + 1" in mutant.id}
    everything = (1, 10**9)
    assert places == {"3": everything, "4": everything, "5": (5, 5), "6": (5, 5)}


def mutant_of(path: Path, operator: str) -> Mutant:
    (found,) = (each for each in mutants(path.read_text(), path.stem) if each.id.split("::")[2] == operator)
    return found


MODULE = """
from functools import cache

class Scale:
    limit = 3

    def halved(self, value, floor=1.5):
        return [part // self.limit for part in value]

@cache
def doubled(value):
    return -value
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "scales.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scales", raising=False)
    return importlib.import_module("scales")


def test_a_fork_runs_the_fault_and_its_parent_does_not(module: ModuleType):
    path = Path(module.__file__)
    loaded, alias, instance = LoadedFunctions([path]), module.doubled, module.Scale()
    assert (alias(4), instance.halved([6])) == (-4, [2])  # the first result stays in the cache

    def with_fault(operator: str) -> tuple[int, list[int]]:
        loaded.change(path, mutant_of(path, operator))
        return alias(4), instance.halved([6])

    operators = ("removed sign or negation", "operation")
    jobs = [Job(operator, lambda operator=operator: with_fault(operator), 60) for operator in operators]
    assert dict(in_forks(jobs, processes=2)) == {"removed sign or negation": [4, [2]], "operation": [-4, [18]]}
    assert (alias(4), instance.halved([6])) == (-4, [2])


def test_faults_that_act_at_import_are_told_apart(module: ModuleType):
    found = mutants(MODULE, "scales")
    assert {each.before for each in found if not each.in_function} == {"3", "1.5"}
    (removed,) = mutants("class A(B):\n    def f(self):\n        super().f()\n", "module")
    assert not removed.in_function  # other code than the function's, which has a cell for its class


def test_a_fork_that_dies_is_told_from_one_that_fails(tmp_path: Path):
    assert list(in_forks([Job("dies", lambda: os._exit(0), 60)], processes=1)) == [("dies", None)]
    with pytest.raises(RuntimeError, match=r"fails: Traceback[\s\S]*ZeroDivisionError"):
        list(in_forks([Job("fails", lambda: 1 / 0, 60)], processes=1))


def test_results_come_back_from_their_file(tmp_path: Path):
    survivor = {"outcome": "survived", "line": 3, "before": "a", "after": "b", "tests": 2, "verdict": "equivalent"}
    results = {
        "loss::mean::constant + 1::1": {"outcome": "killed", "by": "tests/test_loss.py::test", "function_hash": "1"},
        "loss::mean::constant + 1::2": survivor | {"function_hash": "1"},
        "baselines/kd::KD.step::boundary::1": {"outcome": "killed", "by": "the time limit", "function_hash": "2"},
    }
    write(tmp_path / "results.json", results, {"loss": 5, "baselines/kd": 3}, seconds=8)
    write(tmp_path / "results.json", results, {"loss": 4}, seconds=8)  # of a sweep of one module
    assert read_faults(tmp_path / "results.json") == {"loss": 4, "baselines/kd": 3}
    assert read(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["settings"] == {"seconds": 8}
    assert read(tmp_path / "missing.json") == read_faults(tmp_path / "missing.json") == {}


def test_table_is_that_of_the_results_and_every_survivor_has_a_verdict():
    root = Path(__file__).parents[2]
    path = root / "benchmarks" / "results" / "mutation_sweep.json"
    results = read(path)
    assert markdown(results, read_faults(path)) in (root / "CONTRIBUTING.md").read_text()
    assert all(entry.get("verdict") for entry in results.values() if entry["outcome"] != "killed")
