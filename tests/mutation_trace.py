"""Which lines of the package does each test execute?"""

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minillm_trl"

# By test: its "seconds", "lines" by module, and the seconds of the "fixtures" that it shares with other tests
Trace = dict[str, dict[str, Any]]


def source_files(modules: Iterable[str]) -> dict[str, Path]:
    """Return the file of each module, anywhere in the package."""
    files = {}
    for name in modules:
        (files[name],) = PACKAGE.rglob(f"{name}.py")
    return files


class Tracer:
    """A pytest plugin that records the lines that each test and its fixtures execute."""

    def __init__(self, files: dict[str, Path]):
        self.modules = {str(path): name for name, path in files.items()}
        self.found: Trace = {}
        self._lines: list[set[tuple[str, int]]] = []
        self._of_fixture: dict[tuple[str, str], tuple[str, float, set[tuple[str, int]]]] = {}
        self._seconds_of_fixtures = 0.0
        self._passed = True

    def _call(self, frame: Any, event: str, argument: Any) -> Callable | None:
        return self._line if frame.f_code.co_filename in self.modules else None

    def _line(self, frame: Any, event: str, argument: Any) -> Callable:
        self._lines[-1].add((self.modules[frame.f_code.co_filename], frame.f_lineno))
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self._lines, self._passed, self._seconds_of_fixtures = [set()], True, 0.0
        start = time.process_time()
        threading.settrace(self._call)  # of threads that the test starts
        sys.settrace(self._call)
        try:
            result = yield
        finally:
            sys.settrace(None)
            threading.settrace(None)
        seconds = time.process_time() - start - self._seconds_of_fixtures
        (lines,) = self._lines
        fixtures = {}
        for name in getattr(item, "fixturenames", ()):
            for (argument, base), (key, seconds_of_fixture, of_fixture) in self._of_fixture.items():
                if argument == name and item.nodeid.startswith(base):
                    lines |= of_fixture
                    fixtures[key] = round(seconds_of_fixture, 3)
        if self._passed and lines:
            by_module: dict[str, list[int]] = {}
            for module, line in sorted(lines):
                by_module.setdefault(module, []).append(line)
            self.found[item.nodeid] = {"seconds": round(seconds, 3), "fixtures": fixtures, "lines": by_module}
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any):
        if fixturedef.scope == "function":
            return (yield)
        self._lines.append(set())
        start, inner = time.process_time(), self._seconds_of_fixtures
        try:
            return (yield)
        finally:
            lines = self._lines.pop()
            seconds = time.process_time() - start - (self._seconds_of_fixtures - inner)  # without the fixtures inside
            self._seconds_of_fixtures += seconds
            key = f"{fixturedef.baseid}::{fixturedef.argname}[{request.param_index}]"
            self._of_fixture[fixturedef.argname, fixturedef.baseid] = (key, seconds, lines)
            self._lines[-1] |= lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._passed = self._passed and report.outcome == "passed"


class StoredTraces:
    """The traces of test files, in a JSON that is written after each file.

    A trace is out of date once the test file, a helper of the tests or the package has changed.
    """

    def __init__(self, path: Path):
        self.path = path
        others = ("test_", "mutation_", "mutants")
        helpers = {path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith(others)}
        self._shared = b"".join(source.read_bytes() for source in sorted({*PACKAGE.rglob("*.py"), *helpers}))
        self._stored = json.loads(path.read_text()) if path.is_file() else {}

    def _code(self, test: str) -> str:
        return hashlib.sha1(self._shared + (ROOT / test).read_bytes()).hexdigest()

    def missing(self, tests: Iterable[str]) -> list[str]:
        return [test for test in tests if self._stored.get(test, {}).get("code") != self._code(test)]

    def add(self, test: str, trace: Trace) -> None:
        self._stored[test] = {"code": self._code(test), "trace": trace}
        self.path.parent.mkdir(exist_ok=True)  # __pycache__ does not exist under PYTHONDONTWRITEBYTECODE
        self.path.write_text(json.dumps(self._stored))

    def of(self, tests: Iterable[str]) -> Trace:
        return {name: entry for test in tests for name, entry in self._stored[test]["trace"].items()}


def covering_tests(mutant: Mutant, module: str, trace: Trace, kills: Counter[str], seconds: float) -> list[str]:
    """Return tests of the mutant's lines that fit into `seconds`.

    Quick tests and frequent killers come first, and a test with one set of parameters before other tests with their
    second. Tests that share a fixture come together, and its time counts once.
    """
    first, last = mutant.lines
    covering = [
        name for name, entry in trace.items() if any(first <= line <= last for line in entry["lines"].get(module, ()))
    ]
    cost = {name: with_fixtures(trace[name]) / (1 + kills[name]) for name in covering}
    runs_of_test: Counter[str] = Counter()
    for name in sorted(covering, key=cost.__getitem__):
        test = name.partition("[")[0]
        runs_of_test[test] += 1
        cost[name] *= runs_of_test[test]
    chosen: dict[frozenset[str], list[str]] = {}
    total, ready = 0.0, set[str]()
    for name in sorted(covering, key=cost.__getitem__):
        fixtures = trace[name].get("fixtures", {})
        total += trace[name]["seconds"] + sum(fixtures[key] for key in fixtures.keys() - ready)
        if chosen and total > seconds:
            break
        ready |= fixtures.keys()
        chosen.setdefault(frozenset(fixtures), []).append(name)
    return [name for group in chosen.values() for name in group]


def with_fixtures(entry: dict[str, Any]) -> float:
    """Return the seconds of a test that sets up all its fixtures."""
    return entry["seconds"] + sum(entry.get("fixtures", {}).values())


def of_file(items: Sequence[pytest.Item], test: str) -> list[pytest.Item]:
    return [item for item in items if item.nodeid.startswith(f"{test}::")]
