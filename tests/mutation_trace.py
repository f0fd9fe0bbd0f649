"""Which lines of the package does each test execute?"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minillm_trl"

Trace = dict[str, dict[str, Any]]  # by test: "seconds", and "lines" by module


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
        self._of_fixture: dict[tuple[str, str], set[tuple[str, int]]] = {}
        self._passed = True

    def _call(self, frame: Any, event: str, argument: Any) -> Callable | None:
        return self._line if frame.f_code.co_filename in self.modules else None

    def _line(self, frame: Any, event: str, argument: Any) -> Callable:
        self._lines[-1].add((self.modules[frame.f_code.co_filename], frame.f_lineno))
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self._lines, self._passed = [set()], True
        start = time.process_time()
        sys.settrace(self._call)
        try:
            result = yield
        finally:
            sys.settrace(None)
        (lines,) = self._lines
        for name in getattr(item, "fixturenames", ()):
            for (argument, base), of_fixture in self._of_fixture.items():
                if argument == name and item.nodeid.startswith(base):
                    lines |= of_fixture
        if self._passed and lines:
            by_module: dict[str, list[int]] = {}
            for module, line in sorted(lines):
                by_module.setdefault(module, []).append(line)
            self.found[item.nodeid] = {"seconds": round(time.process_time() - start, 3), "lines": by_module}
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any):
        if fixturedef.scope == "function":
            return (yield)
        self._lines.append(set())
        try:
            return (yield)
        finally:
            lines = self._lines.pop()
            self._of_fixture[fixturedef.argname, fixturedef.baseid] = lines
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
    """Return tests of the mutant's lines that fit into `seconds`; quick tests and frequent killers come first."""
    first, last = mutant.lines
    covering = [
        name for name, entry in trace.items() if any(first <= line <= last for line in entry["lines"].get(module, ()))
    ]
    chosen, total = [], 0.0
    for name in sorted(covering, key=lambda name: trace[name]["seconds"] / (1 + kills[name])):
        total += trace[name]["seconds"]
        if chosen and total > seconds:
            break
        chosen.append(name)
    return chosen


def of_file(items: Sequence[pytest.Item], test: str) -> list[pytest.Item]:
    return [item for item in items if item.nodeid.startswith(f"{test}::")]
