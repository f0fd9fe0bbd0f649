"""Do the tests see a fault? Put small faults into the core, one at a time, and run the tests that execute the line.

    python tests/mutation_sweep.py [--modules objectives loss] [--share 0.3] [--seed 0] [--results FILE]

1. Import the package and collect the tests, once.
2. In a fork for each test file, note which lines of `MODULES` each of its tests executes and how long it takes.
3. For each mutant (see `mutants.py`), fork, give the loaded function its changed code, and run the tests of that line,
   quickest first, until one fails. A fault outside functions acts when its module is imported: for those, fork a
   process that has not imported the package.
4. Write the results as they come. The same command resumes an interrupted sweep; it repeats a mutant whose function
   has changed. `--again survived` repeats the survivors.

Tests that start processes are left out, because those processes would not have the fault. Look at every survivor: it
is equivalent, harmless (it changes a message or a speed), or a missing test. `--verdicts FILE`, a JSON of texts by
mutant, adds your findings to the results.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, mutants
from mutation_forks import Job, LoadedFunctions, change_imports, flush, in_forks
from mutation_results import markdown, read, read_faults, write
from mutation_trace import (
    ROOT,
    StoredTraces,
    Trace,
    Tracer,
    covering_tests,
    of_file,
    source_files,
    with_fixtures,
)

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
TESTS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    if path.parent.name not in ("project", "engines")
)
NOT_THOSE = "not distributed and not cli and not notebooks and not slow and not smoke"  # most start processes
PYTEST = ("-q", "--no-header", "-p", "no:cacheprovider", "--capture=sys", "-m", NOT_THOSE)
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")
PATIENCE = 3.0  # a test may take this many times its time in the trace


class Collected:
    """A pytest plugin that hands the collected tests to `work` instead of running them."""

    def __init__(self, work: Callable[[Sequence[pytest.Item]], None]):
        self._work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._work(session.items)
        return True


class FirstFailure:
    """A pytest plugin that records the first failure, and ends the process if a test hangs."""

    def __init__(self, trace: Trace) -> None:
        self.name: str | None = None
        self._trace = trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        # CPU time, here as in the trace: the machine may be busy
        signal.setitimer(signal.ITIMER_PROF, 3 + PATIENCE * with_fixtures(self._trace[item.nodeid]))
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


def run_items(items: Sequence[pytest.Item], plugin: object, failed: Callable[[], bool] = lambda: False) -> None:
    """Run collected tests with one more plugin, until one has failed."""
    config = items[0].config
    config.pluginmanager.register(plugin)
    for item, following in zip(items, [*items[1:], None], strict=True):
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if failed():
            break


def preload(tests: Sequence[str]) -> None:
    """Import all modules that the tests import, except the package and the tests."""

    def names() -> list[str]:
        pytest.main([*PYTEST, "--collect-only", *tests])
        own = ("minillm_trl", "conftest", "test_", "__main__")
        return [
            name
            for name, module in sys.modules.items()
            if not name.startswith(own) and not str(getattr(module, "__file__", "")).startswith(str(ROOT / "tests"))
        ]

    ((_, found),) = in_forks([Job("preload", names, 600)], processes=1)
    if found is None:
        raise RuntimeError("The tests could not be collected in time.")
    for name in found:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # a module that is made, not found
                continue


def trace_tests(items: Sequence[pytest.Item], arguments: argparse.Namespace) -> Trace:
    """Return the lines of each test that passes; test files that have not changed are not traced again."""
    stored = StoredTraces(arguments.trace)
    files = source_files(MODULES)

    def traced(test: str) -> Trace:
        tracer = Tracer(files)
        if own := of_file(items, test):
            run_items(own, tracer)
        return tracer.found

    jobs = (Job(test, lambda test=test: traced(test), 3600) for test in stored.missing(arguments.tests))
    for test, trace in in_forks(jobs, arguments.processes):
        if trace is None:
            raise RuntimeError(f"The trace of {test} took too long, or its process died. Run the file with pytest.")
        flush(f"{test}: {len(trace)} of {len(of_file(items, test))} tests traced")
        stored.add(test, trace)
    return stored.of(arguments.tests)


def import_late_modules(items: Sequence[pytest.Item], trace: Trace) -> None:
    """Import what tests import as they run, so that not every fork does; some tests of each file show what that is."""
    chosen: dict[str, list[pytest.Item]] = {}
    for item in sorted(items, key=lambda item: trace.get(item.nodeid, {}).get("seconds", 0.0)):
        if 0.1 < trace.get(item.nodeid, {}).get("seconds", 0.0) < 2.0:
            chosen.setdefault(item.nodeid.partition("::")[0], []).append(item)

    def imported(some: Sequence[pytest.Item]) -> list[str]:
        before = set(sys.modules)
        run_items(some, object())
        return sorted(name for name in sys.modules.keys() - before if sys.modules[name].__spec__)

    some_of_file = {file: own[:: len(own) // 3 + 1] for file, own in chosen.items()}
    jobs = [Job(file, lambda some=some: imported(some), 600) for file, some in some_of_file.items()]
    for _, names in in_forks(jobs, processes=os.cpu_count()):
        for name in names or ():
            if name not in sys.modules and name.split(".")[0] in LIBRARIES:
                with contextlib.suppress(ImportError):  # a module that is made, not found
                    importlib.import_module(name)


def drawn(found: Sequence[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    """Return the chosen share of a module's mutants; a smaller share, or number, is part of a larger one."""
    draws = {mutant.id: random.Random(f"{arguments.seed} {mutant.id}").random() for mutant in found}
    chosen = [
        mutant
        for mutant in found
        if draws[mutant.id] < arguments.share
        and arguments.only in mutant.id
        and mutant.id.split("::")[2] not in arguments.without
    ]
    return sorted(chosen, key=lambda mutant: draws[mutant.id])[: arguments.most]


class Sweep:
    """The mutants to try, and the results of those that were tried."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.files = source_files(arguments.modules)
        self.results = read(arguments.results)
        self.mutants: dict[str, Mutant] = {}
        self.faults: dict[str, int] = {}
        for module, path in self.files.items():
            found = mutants(path.read_text(), module)
            self.faults[module] = len(found)
            current = {mutant.id: mutant.function_hash for mutant in found}
            for name in [name for name in self.results if module_of(name) == module]:
                if self.results[name]["function_hash"] != current.get(name):
                    del self.results[name]  # of code that has changed
            for mutant in drawn(found, arguments):
                if mutant.id not in self.results or self.results[mutant.id]["outcome"] in arguments.again:
                    self.mutants[mutant.id] = mutant

    def run(self, trace: Trace, inside: bool, run_tests: Callable[[Path, Mutant, list[str]], str | None]) -> None:
        """Try the mutants that are inside functions, or those that are not.

        `run_tests` puts the mutant into the file and returns the first test that fails, in a fork.
        """
        kills = Counter(result.get("by") for result in self.results.values())
        written = time.monotonic()

        def jobs() -> Iterator[Job]:
            for mutant in self.mutants.values():
                if mutant.in_function is not inside:
                    continue
                module = module_of(mutant.id)
                tests = covering_tests(mutant, module, trace, kills, self.arguments.seconds)
                if not tests:
                    self._record(mutant.id, {"outcome": "not run by any test"})
                    continue
                seconds = 300 + 3 * PATIENCE * sum(with_fixtures(trace[name]) for name in tests)  # on a busy machine
                yield Job(mutant.id, lambda mutant=mutant, tests=tests: attempt(mutant, tests), seconds)

        def attempt(mutant: Mutant, tests: list[str]) -> dict[str, Any]:
            failed = run_tests(self.files[module_of(mutant.id)], mutant, tests)
            return {"outcome": "killed", "by": failed} if failed else {"outcome": "survived", "tests": len(tests)}

        for identity, result in in_forks(jobs(), self.arguments.processes):
            outcome = result or {"outcome": "killed", "by": "the time limit, or the end of the process"}
            kills[outcome.get("by")] += 1
            self._record(identity, outcome)
            if time.monotonic() > written + 10:
                self.write()
                written = time.monotonic()
        self.write()

    def _record(self, identity: str, outcome: dict[str, Any]) -> None:
        mutant = self.mutants[identity]
        code = {"line": mutant.lines[0], "before": mutant.before[:200], "after": mutant.after[:200]}
        killed = outcome["outcome"] == "killed"
        self.results[identity] = outcome | ({} if killed else code) | {"function_hash": mutant.function_hash}
        flush(f"{outcome['outcome']:9}  {identity}")

    def write(self) -> None:
        if self.arguments.verdicts:
            verdicts = json.loads(self.arguments.verdicts.read_text())
            for identity, result in self.results.items():
                if result["outcome"] != "killed" and identity in verdicts:
                    result["verdict"] = verdicts[identity]
        write(self.arguments.results, self.results, self.faults, seconds=self.arguments.seconds)


def module_of(identity: str) -> str:
    return identity.split("::")[0]


def sweep_functions(arguments: argparse.Namespace) -> None:
    """Trace the tests and try the mutants inside functions; the package is imported before the forks."""

    def work(items: Sequence[pytest.Item]) -> None:
        trace = trace_tests(items, arguments)
        import_late_modules(items, trace)
        by_name = {item.nodeid: item for item in items}
        for path in source_files(arguments.modules).values():
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        loaded = LoadedFunctions(source_files(arguments.modules).values())

        def run_tests(path: Path, mutant: Mutant, tests: list[str]) -> str | None:
            loaded.change(path, mutant)
            failure = FirstFailure(trace)
            run_items([by_name[name] for name in tests], failure, lambda: failure.name is not None)
            return failure.name

        Sweep(arguments).run(trace, True, run_tests)

    code = pytest.main([*PYTEST, *arguments.tests], plugins=[Collected(work)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!s}")


def sweep_modules(arguments: argparse.Namespace) -> None:
    """Try the mutants outside functions; the forks import the package."""
    stored = StoredTraces(arguments.trace)
    trace = stored.of(arguments.tests)

    def run_tests(path: Path, mutant: Mutant, tests: list[str]) -> str | None:
        change_imports(path, mutant)
        failure = FirstFailure(trace)
        quick = max(1, sum(total < 3 for total in accumulate(with_fixtures(trace[name]) for name in tests)))
        for part in (tests[:quick], tests[quick:]):  # collecting all tests takes longer than most faults live
            if part and failure.name is None:
                code = pytest.main([*PYTEST, "-x", *part], plugins=[failure])
                if code != 0 and failure.name is None:
                    if changed := stored.missing(sorted({name.partition("::")[0] for name in tests})):
                        raise RuntimeError(f"{', '.join(changed)} changed during the sweep. Run it again.")
                    failure.name = f"pytest ended with {code!s}"
        return failure.name

    Sweep(arguments).run(trace, False, run_tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument("--tests", nargs="+", default=TESTS, choices=TESTS, metavar="FILE", help="run these alone")
    parser.add_argument("--only", default="", help="part of the mutants' ids, such as the name of a function")
    parser.add_argument("--without", nargs="+", default=(), help="kinds of faults, such as 'swapped arguments'")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, drawn by the seed")
    parser.add_argument("--most", type=int, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="of tests for a mutant, by their time in the trace"
    )
    parser.add_argument("--again", nargs="+", default=(), help="outcomes to run again, such as survived")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that try mutants side by side")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "mutation_sweep.json")
    parser.add_argument("--trace", type=Path, default=ROOT / "tests" / "__pycache__" / "mutation_trace.json")
    parser.add_argument("--verdicts", type=Path, help="JSON of what survivors are, by id")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT))
    preload(arguments.tests)
    child = os.fork()
    if child == 0:
        try:
            sweep_functions(arguments)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("The sweep of functions failed; see above.")
    sweep_modules(arguments)
    print(markdown(read(arguments.results), read_faults(arguments.results)))


if __name__ == "__main__":
    main()
