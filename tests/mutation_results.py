"""The results of a sweep in a file, and as a table."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]  # by mutant


def read(path: Path) -> Results:
    """Return the results in a file that `write` wrote; empty if there is none."""
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    results: Results = {}
    for function, entry in record["results"].items():
        for fault, test in entry.get("killed", {}).items():
            results[f"{function}::{fault}"] = {"outcome": "killed", "by": record["tests"][test]}
        for fault, result in entry.get("left", {}).items():
            results[f"{function}::{fault}"] = dict(result)
        for fault in [*entry.get("killed", {}), *entry.get("left", {})]:
            results[f"{function}::{fault}"]["function_hash"] = entry["function_hash"]
    return results


def read_faults(path: Path) -> dict[str, int]:
    """Return the number of faults of each module when it was last swept; empty if there is no file."""
    return json.loads(path.read_text()).get("faults", {}) if path.is_file() else {}


def write(path: Path, results: Results, faults: dict[str, int], **settings: Any) -> None:
    """Write the results atomically: by function, and each test's name once. `faults` counts those of each module."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from measurement import commit, machine, version

    tests = sorted({result["by"] for result in results.values() if result["outcome"] == "killed"})
    numbers = {test: number for number, test in enumerate(tests)}
    functions: dict[str, dict[str, Any]] = {}
    for identity, result in sorted(results.items()):
        module, function, *fault = identity.split("::")
        entry = functions.setdefault(f"{module}::{function}", {"function_hash": result["function_hash"]})
        if result["outcome"] == "killed":
            entry.setdefault("killed", {})["::".join(fault)] = numbers[result["by"]]
        else:
            left = {name: value for name, value in result.items() if name != "function_hash"}
            entry.setdefault("left", {})["::".join(fault)] = left
    record = {
        "command": " ".join(["python", "tests/mutation_sweep.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "pytest")},
        "settings": settings,
        "faults": read_faults(path) | faults,
        "tests": tests,
        "results": functions,
    }
    part = path.with_suffix(".part")
    part.write_text(_lines(record) + "\n")
    os.replace(part, path)


def _lines(record: dict[str, Any]) -> str:
    """Return JSON with a line for each function and test, so that a change of one is a change of a line."""
    rest = {name: value for name, value in record.items() if name not in ("tests", "results")}
    tests = ",\n".join(f"  {json.dumps(test)}" for test in record["tests"])
    functions = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in record["results"].items())
    start = json.dumps(rest, indent=1)[:-2]
    return f'{start},\n "tests": [\n{tests}\n ],\n "results": {{\n{functions}\n }}\n}}'


def markdown(results: Results, faults: dict[str, int]) -> str:
    """Return a Markdown table of the modules; `faults` counts those of each module, tried or not."""
    lines = ["| module | faults | tried | killed | survived | not run by any test |", "|---|---:|---:|---:|---:|---:|"]
    rows = []
    for module in sorted({name.split("::")[0] for name in results}):
        outcomes = Counter(entry["outcome"] for name, entry in results.items() if name.startswith(f"{module}::"))
        counts = [sum(outcomes.values()), *(outcomes[name] for name in ("killed", "survived", "not run by any test"))]
        rows.append([faults[module], *counts])
        lines.append(f"| {module} | " + " | ".join(map(str, rows[-1])) + " |")
    lines.append("| together | " + " | ".join(str(sum(column)) for column in zip(*rows, strict=True)) + " |")
    return "\n".join(lines)
