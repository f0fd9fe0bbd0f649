"""Bad input for the command line: `python tests/tools/fuzzing.py --number 10000 --seed 0`.

Input `n` of a kind depends on the seed, the kind and `n` alone. A refusal must be one of the errors that the command
line prints as its message, and must name the file, option or folder. Refused input must leave nothing under a final
name; results of accepted input must be sound.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, of the models

import fuzz_commands
import fuzz_data
import fuzz_records

from minillm_trl.cli import printed
from minillm_trl.errors import UserError

KINDS = {
    each.__name__: each
    for each in (
        *(fuzz_data.data_file, fuzz_data.corpus, fuzz_data.saved_dataset, fuzz_data.prepared_data),
        *(fuzz_data.vicuna, fuzz_data.natural_instructions),
        *(fuzz_records.evaluation_results, fuzz_records.verdicts, fuzz_records.teacher_data, fuzz_records.records),
        *(fuzz_commands.recipe_files, fuzz_commands.yaml_file, fuzz_commands.command_line),
        fuzz_commands.model_folder,
    )
}
SECONDS = 60  # a longer run is a hang
MEMORY = 6 * 2**30  # bytes of additional address space


class Hang(BaseException):
    """The input took longer than `SECONDS`."""


def try_input(kind: str, seed: int, number: int, place: Path) -> tuple[str, str | None]:
    """Run one input; return its outcome ("accepted" or "refused"), and the problem with it, if any."""
    folder = place / f"{kind}-{number}"
    here = folder / "here" / "here"  # for relative paths, `../..` among them
    here.mkdir(parents=True)
    environment = dict(os.environ)
    os.environ["MINILLM_TRL_TRACEBACK"] = "1"  # errors are looked at before they become messages
    try:
        with _quiet() as said, _limited(), contextlib.chdir(here):
            made = KINDS[kind](Random(f"{seed} {kind} {number}"), folder)
            before = set(folder.rglob("*"))
            try:
                result = made.run()
            except BaseException as error:
                left = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before)
                return "refused", _problem(error, made.names, said.getvalue()) or _partial(left)
            try:
                made.check(result)
            except Exception as error:
                return "accepted", f"accepted what is not sound: {type(error).__name__}: {str(error)[:300]}"
            return "accepted", None
    finally:
        os.environ.clear()
        os.environ.update(environment)
        shutil.rmtree(folder, ignore_errors=True)


def _problem(error: BaseException, names: tuple[object, ...], said: str) -> str | None:
    """Return the problem with a refusal, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    where = next((frame for frame in reversed(frames) if "minillm_trl" in frame.filename), frames[-1])
    place = f"{Path(where.filename).name}:{where.name}"
    message = said if isinstance(error, SystemExit) else str(error)
    told = f"{place}: {type(error).__name__}: {message[:300]}"
    if isinstance(error, SystemExit):
        return None if error.code == 0 or ("error: " in said and _names_any(names, said)) else told
    if not isinstance(error, UserError):
        return told
    if len(printed(error)) > 4000:
        return f"{place}: a message of {len(message)} characters"
    return None if _names_any(names, message) else f"names nothing: {told}"


def _names_any(names: tuple[object, ...], message: str) -> bool:
    return any(str(name) in message or repr(str(name)) in message for name in names if name)


def _partial(left: list[str]) -> str | None:
    """Return the files that a refused input left, except those with the name of an unfinished file."""
    final = [path for path in left if not any(part.startswith(".") for part in Path(path).parts)]
    return f"left behind: {final[:3]}" if final else None


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        yield said


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limit seconds and memory."""

    def stop(*_: object) -> None:
        raise Hang

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> int:
    """Run inputs of all kinds, and print the numbers of accepted and refused inputs, and all problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    each = -(-arguments.number // len(arguments.kinds))
    status = 0
    with tempfile.TemporaryDirectory() as place:
        for kind in arguments.kinds:
            ended, problems, examples = Counter(), Counter(), {}
            for number in range(each):
                end, problem = try_input(kind, arguments.seed, number, Path(place))
                ended[end] += 1
                if problem is not None:
                    key = ": ".join(problem.split(": ")[:2])[:80]
                    problems[key] += 1
                    examples.setdefault(key, (number, problem))
            print(f"{kind:<22} {each:>6} inputs, {ended['accepted']} accepted, {ended['refused']} refused", flush=True)
            for key, count in problems.most_common():
                print(
                    f"  {count:>5}  number {examples[key][0]}: {examples[key][1]!r}".replace(place, "PLACE"),
                    flush=True,
                )
            status = status or bool(problems)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
