"""`minillm-trl recipe`: run all stages of a recipe, from the data to the table, and skip finished ones."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..errors import UserError
from ..evaluation.comparison import compare_models
from ..evaluation.results import read_evaluation
from .arguments import PlainParser, parse_plain
from .compare import read_histories, show
from .launch import accelerate_config_path, recipes_folder
from .stages import TRAINING, Recipe, Stage, move_aside, read_recipe, remedy

# Seconds after Ctrl-C until a stage that did not get it from the terminal is interrupted
_PATIENCE = 10


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "recipe",
        description="Run the stages of a recipe in order, from the data to the table. Finished stages are "
        "skipped, and interrupted training resumes from its newest checkpoint.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="folder with recipe.yaml, or the name of one of this package's, such as gpt2-120m-from-1.5b",
    )
    parser.add_argument("--list", action="store_true", help="show the stages and their state, and run nothing")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="run only these; `evaluate` is all evaluations")
    parser.add_argument(
        "--rerun",
        nargs="+",
        default=[],
        metavar="STAGE",
        help="rerun these and the stages that build on them; their folders are moved aside",
    )
    parser.add_argument(
        "--accept",
        nargs="+",
        default=[],
        metavar="STAGE",
        help="accept the contents of their folders as results, show the stages, and run nothing",
    )
    parser.add_argument("--accelerate_config", help="launch configuration of the training stages: a file or a name")
    parser.add_argument("--num_processes", type=int, help="number of training processes, one per GPU")
    return parser


def recipe_path(folder: Path) -> Path:
    """Return the folder if it exists, or the recipe of this package that it names, with or without `recipes/`."""
    shipped = recipes_folder(folder.name)
    named = folder.parent in (Path(), Path("recipes")) and (shipped / "recipe.yaml").is_file()
    return shipped if named and not folder.is_dir() else folder


def run(argv: list[str]) -> int:
    """Parse the arguments, check the YAMLs of all stages, run the unfinished ones, and print the table."""
    arguments = parse_plain(build_parser(), argv)
    launch = _launch_words(arguments)
    if arguments.accept and (arguments.rerun or arguments.stages):
        raise UserError("--accept runs nothing. Leave --rerun and --stages out, and run the recipe afterwards.")
    recipe = read_recipe(recipe_path(arguments.folder))
    chosen = recipe.stages if arguments.stages is None else recipe.named(arguments.stages)
    again = recipe.with_dependents(_to_rerun(recipe, arguments.rerun, chosen))
    _accept(recipe, recipe.named(arguments.accept))
    _print_plan(recipe, chosen, again)
    if arguments.list or arguments.accept:
        return 0
    _check_chosen(recipe, chosen, again)
    for folder in recipe.outdated(again):
        if (moved := move_aside(folder)) is not None:
            print(f"{folder} was moved to {moved}")
    for number, stage in enumerate(recipe.stages, start=1):
        if stage not in chosen:
            continue
        recipe.check(stage)  # again, since an earlier stage may have made new data
        # prepare-data always runs, since only it knows whether its source has changed
        if recipe.is_done(stage) and (stage.subcommand != "prepare-data" or stage.is_accepted):
            continue
        print(f"\n{number}/{len(recipe.stages)}  {stage.name}", flush=True)
        status = _run_stage(recipe, stage, launch)
        if status != 0:
            print(
                f"minillm-trl recipe: stage {stage.name} ended with status {status}; see its output above. Fix "
                "the cause, and rerun the same command, without --rerun, to resume with this stage.",
                file=sys.stderr,
            )
            return status
    _compare(recipe)
    return 0


def _launch_words(arguments: argparse.Namespace) -> list[str]:
    words = []
    if arguments.accelerate_config is not None:
        words += ["--accelerate_config", str(accelerate_config_path(arguments.accelerate_config))]
    if arguments.num_processes is not None:
        if arguments.num_processes < 1:
            raise UserError(f"--num_processes must be positive, got {arguments.num_processes}.")
        words += ["--num_processes", str(arguments.num_processes)]
    return words


def _to_rerun(recipe: Recipe, names: list[str], chosen: list[Stage]) -> list[Stage]:
    stages = recipe.named(names)
    for stage in stages:
        if stage not in chosen:
            raise UserError(
                f"--rerun {stage.name}: --stages leaves it out, so its folder would be moved aside without a rerun. "
                "Name it in both."
            )
    return stages


def _accept(recipe: Recipe, stages: list[Stage]) -> None:
    for stage in stages:
        if not stage.output.is_dir():
            raise UserError(f"--accept {stage.name}: there is no folder {stage.output}.")
        stage.mark(recipe.inputs(stage), finished=True, accepted=True)


def _print_plan(recipe: Recipe, chosen: list[Stage], again: list[Stage]) -> None:
    width = max(len(stage.name) for stage in recipe.stages)
    for number, stage in enumerate(recipe.stages, start=1):
        state = "again" if stage in again else _state(recipe, stage)
        skipped = "" if stage in chosen or state == "done" else ", not chosen"
        print(f"{number:>3}  {stage.name:<{width}}  {state}{skipped}")


def _state(recipe: Recipe, stage: Stage) -> str:
    if (problem := recipe.problem(stage)) is not None:
        return f"changed: {problem}"
    if stage.marker is None:
        return "pending"
    return "done" if stage.is_finished else "stopped"


def _check_chosen(recipe: Recipe, chosen: list[Stage], again: list[Stage]) -> None:
    """Check the chosen stages and those they build on; problems of other stages do not matter."""
    for stage in recipe.with_inputs(chosen):
        if stage not in again:
            recipe.check(stage)
    done = [stage for stage in recipe.stages if stage not in again and recipe.is_done(stage)]
    for stage in chosen:
        missing = [source.name for source in recipe.inputs(stage) if source not in chosen and source not in done]
        if stage not in done and missing:
            raise UserError(f"stage {stage.name} builds on {missing[0]}, which is not done. Add it to --stages.")


def _run_stage(recipe: Recipe, stage: Stage, launch: list[str]) -> int:
    inputs = recipe.inputs(stage)
    if stage.subcommand in TRAINING:
        stage.mark(inputs, finished=False)
        words = [*stage.words, *launch, "--resume_from_checkpoint", "true"]
        status = run_subcommand(stage.subcommand, words)
    elif stage.subcommand == "shrink":
        was_finished = stage.is_finished
        status = run_subcommand("shrink", stage.words)
        if status != 0 and was_finished:
            raise UserError(f"stage {stage.name} failed, see above. {remedy(stage)}")
    else:
        status = _run_here(stage)
    # prepare-data leaves an up-to-date folder and its marker unchanged
    if status == 0 and not stage.is_finished:
        stage.mark(inputs, finished=True)
    return status


def _run_here(stage: Stage) -> int:
    was_finished = stage.is_finished
    try:
        return import_module(f".{stage.subcommand.replace('-', '_')}", __package__).run(stage.words)
    except UserError as error:
        if not was_finished:
            raise
        raise UserError(f"stage {stage.name}: {error} {remedy(stage)}") from error


def run_subcommand(subcommand: str, words: Sequence[str]) -> int:
    """Run a subcommand in a process of its own, which frees its memory, and return its status.

    The status is 128 + N for a signal N. If this process is interrupted, it waits for the other one.
    """
    process = subprocess.Popen([sys.executable, "-m", "minillm_trl", subcommand, *words])
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    return status if status >= 0 else 128 - status


def _compare(recipe: Recipe) -> None:
    evaluations = [stage for stage in recipe.stages if stage.subcommand == "evaluate" and stage.is_finished]
    if not evaluations:
        return
    valid = [stage for stage in evaluations if all(map(recipe.is_done, recipe.with_inputs([stage])))]
    if left_out := [stage.name for stage in evaluations if stage not in valid]:
        print(f"\nNot in the table, since stages they build on have changed: {', '.join(left_out)}")
    if not valid:
        return
    names = [stage.name.split(":")[1] for stage in valid]
    models = [read_evaluation(name, stage.output) for name, stage in zip(names, valid, strict=True)]
    baseline, teacher = (name if name in names else None for name in (recipe.baseline, recipe.teacher))
    show(compare_models(models, baseline, teacher, read_histories(models, {})), recipe.report)
