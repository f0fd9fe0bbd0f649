"""Do the tests see a fault? Put small faults into the core, one at a time, and run the tests that execute the line.

    python tests/mutation_sweep.py [--modules objectives loss] [--share 0.3] [--seed 0] [--results FILE]

1. Run every test of `TESTS` once, and note which lines of `MODULES` it executes and how long it takes.
2. For each mutant (see `mutants.py`), fork a process that has imported torch and TRL but not the package. The fork
   imports the package with the fault and runs the tests of that line, quickest first, until one fails.
3. Write the results after each mutant. The same command resumes an interrupted sweep; it repeats a mutant whose
   function has changed. `--again survived` repeats the survivors.

Tests that start processes are left out, because those processes would not have the fault. Look at every survivor: it
is equivalent, harmless (it changes a message or a speed), or a missing test. `--verdicts FILE`, a JSON of texts by
mutant, adds your findings to the results.
"""

import argparse
import hashlib
import importlib
import importlib.machinery
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, apply, mutants

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minillm_trl"

# What is mutated, by file name, or with its folder where two files share the name. Which tests cover a line is traced,
# not listed here. Left out: the command line, loading of data, pages and figures, and lists of refusals.
MODULES = (
    # formulas
    *("objectives", "divergences", "advantages", "masking", "loss", "positions", "scores", "token_scores", "spans"),
    *("fused_head", "divergence_gradients", "head_gradients", "lm_head", "packed_weights", "trained_products"),
    # sampling
    *("sampling", "compiled_sampling", "compiled_steps", "slots", "slot_sampling", "speculative", "engine_drafts"),
    *("teacher_replacement", "decoding", "ngram_block", "logits_processor", "coins", "draws", "keyed_random"),
    *("buffer", "rollout_sampler", "rollout_teacher", "several_teachers", "cross_tokenizer", "token_bytes", "prompts"),
    # models
    *("teacher", "stored", "top_k", "reference", "student_copy", "adapters", "merged_adapters", "attention", "layers"),
    *("context", "dropout", "encoding", "end_tokens", "models/shrink", "layer_importance"),
    # the trainer
    *("trainer", "teacher_mixed_trainer", "language_modeling", "given_completions", "decoding_setup", "vllm_drafts"),
    *("mixing_choice", "rollout_buffer", "rollout_rewards", "rollout_scoring", "finite_steps", "nonfinite_rows"),
    *("trained_weights", "exact_resume", "resumed_settings", "hyperparameters", "prompt_order", "ends_of_run"),
    *("overlapped_rollouts", "turns"),
    # what it reports
    *("logged_metrics", "rollout_metrics", "run_metrics", "metric_directions", "evaluation_rows", "degeneration"),
    # baselines and evaluation
    *("fine_tuning", "baselines/kd", "baselines/seqkd", "teacher_data"),
    *("evaluation/evaluate", "evaluation/metrics", "answers", "divergence", "exposure_bias", "calibration"),
    *("statistics", "significance", "comparison", "frontier", "task_measures"),
)
# Tests that run the core in their own process
TESTS = tuple(
    str(next((ROOT / "tests").rglob(f"test_{name}.py")).relative_to(ROOT))
    for name in (
        *("objectives", "divergences", "loss", "positions", "variance_reduction", "exact_gradient", "original_code"),
        *("fused_head", "packed_weights", "trained_products", "spans", "cross_tokenizer", "top_k"),
        *("sampling", "compiled_sampling", "speculative", "engine_drafts", "teacher_replacement", "logits_processor"),
        *(
            "ngram_block",
            "rollout_sampler",
            "rollout_buffer",
            "rollout_scores",
            "tool_scores",
            "several_teachers",
            "stored",
        ),
        *(
            "teacher",
            "reference",
            "context",
            "dropout",
            "families",
            "adapters",
            "merged_adapters",
            "attention",
            "encoding",
            "end_tokens",
        ),
        *("shrink", "remote_teacher"),
        *("trainer", "trainer_gradient", "trainer_options", "trl_contract", "whole_steps", "exact_metrics", "config"),
        *("language_modeling", "given_completions", "decoding_setup", "vllm_drafts", "mixing_choice", "drop_in"),
        *("mixed_precision", "distributed", "trained_weights", "reliable_runs", "resumed_settings", "ends_of_run"),
        *(
            "overlap",
            "overlap_thread",
            "prompt_order",
            "turns",
            "finite_steps",
            "completion_table",
            "run_metrics",
            "rollout_rewards",
            "degeneration",
            "metric_directions",
            "metric_names",
            "kd",
            "seqkd",
        ),
        *(
            "evaluation",
            "evaluate_command",
            "evaluate_tasks",
            "evaluate_temperatures",
            "metrics",
            "divergence",
            "exposure_bias",
        ),
        *(
            "calibration",
            "statistics",
            "judge",
            "compare",
            "compare_temperatures",
            "comparison_pages",
            "verdicts",
            "frontier",
        ),
    )
)
NOT_THOSE = "not distributed and not cli and not notebooks and not slow"
PYTEST = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", NOT_THOSE)
PATIENCE = 8.0  # a test may take this many times its time in the trace

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


class FirstFailure:
    """A pytest plugin that records the first failure, and ends the process if a test hangs."""

    def __init__(self, trace: Trace) -> None:
        self.name: str | None = None
        self._trace = trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        # CPU time, here as in the trace: the machine may be busy
        signal.setitimer(signal.ITIMER_PROF, 30 + PATIENCE * self._trace[item.nodeid]["seconds"])
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.name is None:
            self.name = f"import of {report.nodeid}"


def in_fork(work: Callable[[], Any], seconds: float) -> Any:
    """Return the JSON-able result of `work` in a fork; None if it takes too long or dies."""
    with tempfile.NamedTemporaryFile("r") as answer:
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                quiet = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(quiet, stream)
                result = json.dumps(work())
                Path(answer.name).write_text(result)
                os._exit(0)
            finally:
                os._exit(1)
        deadline = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)
        text = answer.read()
    return json.loads(text) if text else None


def preload(tests: Sequence[str]) -> None:
    """Import all modules that the tests import, except the package and the tests."""

    def names() -> list[str]:
        pytest.main([*PYTEST, "--collect-only", *tests])
        own = ("minillm_trl", "conftest", "test_", "__main__")
        outside = [
            name
            for name, module in sys.modules.items()
            if not name.startswith(own) and not str(getattr(module, "__file__", "")).startswith(str(ROOT / "tests"))
        ]
        return outside

    for name in in_fork(names, 600) or ():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # a module that is made, not found
                continue


def trace_test(files: dict[str, Path], test: str) -> Trace:
    """Return the trace of one test file."""

    def run() -> Trace:
        tracer = Tracer(files)
        options = [option for option in PYTEST if option != "-x"]
        pytest.main([*options, test], plugins=[tracer])
        return tracer.found

    start = time.monotonic()
    trace = in_fork(run, 3600) or {}
    print(f"{test}: {len(trace)} tests, {time.monotonic() - start:.0f} s", flush=True)
    return trace


def load_trace(path: Path, files: dict[str, Path], tests: Sequence[str]) -> Trace:
    """Return the trace in `path`, written after each test file, and made again where the code or the test changed."""
    own = {Path(__file__), Path(__file__).with_name("mutants.py")}
    every = {*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")} - own
    shared = b"".join(source.read_bytes() for source in sorted(every) if not source.name.startswith("test_"))
    code = {test: hashlib.sha1(shared + (ROOT / test).read_bytes()).hexdigest() for test in tests}
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(exist_ok=True)  # __pycache__ does not exist under PYTHONDONTWRITEBYTECODE
    for test in tests:
        if stored.get(test, {}).get("code") != code[test]:
            stored[test] = {"code": code[test], "trace": trace_test(files, test)}
            path.write_text(json.dumps(stored))
    return {name: entry for test in tests for name, entry in stored[test]["trace"].items()}


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


def install(path: Path, mutant: Mutant) -> None:
    """Make imports of `path` find the mutant."""
    original = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> Any:
        if Path(self.path) != path:
            return original(self, fullname)
        return compile(apply(path.read_text(), mutant), str(path), "exec")

    importlib.machinery.SourceFileLoader.get_code = get_code


def try_mutant(mutant: Mutant, path: Path, tests: Sequence[str], trace: Trace) -> dict[str, Any]:
    """Return whether a test sees the fault, and which one."""
    if not tests:
        return {"outcome": "not run by any test"}

    def run() -> dict[str, Any]:
        install(path, mutant)
        failure = FirstFailure(trace)
        quick = max(1, sum(total < 3 for total in accumulate(trace[name]["seconds"] for name in tests)))
        for part in (tests[:quick], tests[quick:]):  # collecting all tests takes longer than most faults live
            if part and failure.name is None:
                code = pytest.main([*PYTEST, *part], plugins=[failure])
                if code != 0 and failure.name is None:
                    failure.name = f"pytest ended with {code!s}"
        return {"outcome": "killed", "by": failure.name} if failure.name else {"outcome": "survived"}

    expected = sum(trace[name]["seconds"] for name in tests)
    result = in_fork(run, 300 + 3 * PATIENCE * expected)  # also on a busy machine
    if result is None:
        return {"outcome": "killed", "by": "the time limit, or the end of the process"}
    return result | ({"tests": len(tests)} if result["outcome"] == "survived" else {})


def drawn(found: Sequence[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    """Return the chosen share of a module's mutants; a smaller share, or number, is part of a larger one."""
    draws = {mutant.id: random.Random(f"{arguments.seed} {mutant.id}").random() for mutant in found}
    chosen = [mutant for mutant in found if draws[mutant.id] < arguments.share and arguments.only in mutant.id]
    return sorted(chosen, key=lambda mutant: draws[mutant.id])[: arguments.most]


def sweep(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    files = source_files(arguments.modules)
    preload(arguments.tests)
    trace = load_trace(arguments.trace, source_files(MODULES), arguments.tests)
    results: dict[str, dict[str, Any]] = {}
    if arguments.results.is_file():
        results = json.loads(arguments.results.read_text())["results"]
    for module, path in files.items():
        found = mutants(path.read_text(), module)
        current = {mutant.id: mutant.function_hash for mutant in found}
        for name in [name for name in results if name.split("::")[0] == module]:
            if results[name]["function_hash"] != current.get(name):
                del results[name]  # of code that has changed
        for mutant in drawn(found, arguments):
            if mutant.id in results and results[mutant.id]["outcome"] not in arguments.again:
                continue
            start = time.monotonic()
            kills = Counter(result.get("by") for result in results.values())
            tests = covering_tests(mutant, module, trace, kills, arguments.seconds)
            outcome = try_mutant(mutant, path, tests, trace)
            results[mutant.id] = {
                "line": mutant.lines[0],
                "before": mutant.before[:200],
                "after": mutant.after[:200],
                **outcome,
                "function_hash": mutant.function_hash,
            }
            print(f"{time.monotonic() - start:5.1f} s  {outcome['outcome']:9}  {mutant.id}", flush=True)
            write(arguments, results)
    return results


def write(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Write the results atomically."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from measurement import commit, machine, version

    if arguments.verdicts:
        verdicts = json.loads(arguments.verdicts.read_text())
        for identity, result in results.items():
            if result["outcome"] != "killed" and identity in verdicts:
                result["verdict"] = verdicts[identity]
    record = {
        "command": " ".join(["python", "tests/mutation_sweep.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "pytest")},
        "settings": {"seconds": arguments.seconds},
        "results": dict(sorted(results.items())),
    }
    part = arguments.results.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, arguments.results)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the modules, and a list of survivors."""
    lines = ["| module | mutants | killed | survived | not run by any test |", "|---|---|---|---|---|"]
    for module in sorted({name.split("::")[0] for name in results}):
        outcomes = Counter(entry["outcome"] for name, entry in results.items() if name.startswith(f"{module}::"))
        counts = [sum(outcomes.values()), *(outcomes[name] for name in ("killed", "survived", "not run by any test"))]
        lines.append(f"| {module} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument("--tests", nargs="+", default=TESTS, choices=TESTS, metavar="FILE", help="run these alone")
    parser.add_argument("--only", default="", help="part of the mutants' ids, such as the name of a function")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, drawn by the seed")
    parser.add_argument("--most", type=int, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="of tests for a mutant, by their time in the trace"
    )
    parser.add_argument("--again", nargs="+", default=(), help="outcomes to run again, such as survived")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "mutation_sweep.json")
    parser.add_argument("--trace", type=Path, default=ROOT / "tests" / "__pycache__" / "mutation_trace.json")
    parser.add_argument("--verdicts", type=Path, help="JSON of what survivors are, by id")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT))
    print(markdown(sweep(arguments)))


if __name__ == "__main__":
    main()
