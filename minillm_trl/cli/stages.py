"""The stages of a recipe: what they run, what they build on, and whether they are done."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from itertools import combinations, count
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from ..baselines.teacher_data import default_teacher_data_dir
from ..errors import UserError
from ..files.json_files import read_json
from ..files.whole_files import make_folder, write_whole
from ..files.yaml_files import line_of, read_yaml
from .arguments import Parser
from .option_values import check_config, check_plain_yaml, with_first_names

TRAINING = ("sft", "kd", "seqkd", "minillm")
_SUBCOMMANDS = ("prepare-data", "shrink", *TRAINING)
_MODELS = ("shrink", *TRAINING)  # that make a model, which can be evaluated
_MARKER = "stage.json"


class _Marker(TypedDict):
    config: dict[str, Any]
    inputs: dict[str, str | None]
    finished: str | None
    accepted: NotRequired[bool]


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name (`str`): as in `--stages`.
        subcommand (`str`): of `minillm-trl`.
        config (`Path`): its YAML.
        values (`dict`): what the YAML and the recipe say; a change of it makes another stage of it.
        output (`Path`): the folder that it writes to, relative to where the command is run.
    """

    name: str
    subcommand: str
    config: Path
    values: dict[str, Any]
    output: Path

    @property
    def words(self) -> list[str]:
        """Arguments of the subcommand."""
        if self.subcommand != "evaluate":
            return ["--config", str(self.config)]
        return ["--config", str(self.config), "--model", self.values["model"], "--output_dir", str(self.output)]

    @property
    def answers(self) -> Path | None:
        """Where SeqKD keeps the teacher's answers."""
        if self.subcommand != "seqkd":
            return None
        folder = self.values.get("teacher_data_dir") or default_teacher_data_dir(str(self.output))
        return Path(os.path.normpath(folder))

    @property
    def folders(self) -> list[Path]:
        """All that it writes to."""
        return [self.output] if self.answers is None else [self.output, self.answers]

    @property
    def marker(self) -> dict[str, Any] | None:
        """What the stage's folder says of the run in it: configuration, inputs, and when it was finished."""
        path = self.output / _MARKER
        mend = "Delete this file; `--accept STAGE` then takes what is in the folder as the stage's result."
        return read_json(path, _Marker, mend) if path.is_file() else None

    @property
    def is_finished(self) -> bool:
        return self.marker is not None and self.marker["finished"] is not None

    @property
    def is_accepted(self) -> bool:
        return self.is_finished and self.marker.get("accepted", False)

    def mark(self, inputs: list["Stage"], finished: bool, accepted: bool = False) -> None:
        """Write the marker."""
        make_folder(self.output)
        marker = {
            "subcommand": self.subcommand,
            "config": self.values,
            "inputs": {str(each.output): each.digest() for each in inputs},
            "finished": datetime.now(UTC).isoformat() if finished else None,
            "accepted": accepted,
        }
        write_whole(self.output / _MARKER, json.dumps(marker, indent=1))

    def digest(self) -> str | None:
        """Of the marker, so another one for each run; None before the stage is finished."""
        return hashlib.sha256(json.dumps(self.marker).encode()).hexdigest() if self.is_finished else None


@dataclass(frozen=True)
class Recipe:
    """The stages of a recipe in order, the evaluations last, and the names of baseline and teacher."""

    folder: Path
    stages: list[Stage]
    baseline: str | None
    teacher: str | None
    report: Path

    def inputs(self, stage: Stage) -> list[Stage]:
        """The earlier stages whose folders the stage's configuration names."""
        return self._earlier(stage, stage.values)

    def _earlier(self, stage: Stage, values: Any) -> list[Stage]:
        paths = [Path(os.path.normpath(text)) for text in _texts(values)]
        return [
            each
            for each in self.stages[: self.stages.index(stage)]
            if any(folder == path or folder in path.parents for folder in each.folders for path in paths)
        ]

    def with_inputs(self, stages: list[Stage]) -> list[Stage]:
        """The stages, and all that they build on, in order."""
        found = list(stages)
        for stage in reversed(self.stages):
            if stage in found:
                found += [each for each in self.inputs(stage) if each not in found]
        return [stage for stage in self.stages if stage in found]

    def with_dependents(self, stages: list[Stage]) -> list[Stage]:
        """The stages, and those that build on them, in order."""
        found: list[Stage] = []
        for stage in self.stages:
            if stage in stages or any(each in found for each in self.inputs(stage)):
                found.append(stage)
        return found

    def named(self, names: list[str]) -> list[Stage]:
        """Stages by name; `evaluate` names all evaluations.

        Raises:
            ValueError: for a name that no stage has.
        """
        for name in names:
            if name != "evaluate" and name not in [stage.name for stage in self.stages]:
                known = ", ".join(stage.name for stage in self.stages)
                raise UserError(f"{self.folder} has no stage {name!r}. There are: {known}; `evaluate` is all of them.")
        return [stage for stage in self.stages if stage.name in names or stage.name.split(":")[0] in names]

    def outdated(self, again: list[Stage]) -> list[Path]:
        """The folders that hold nothing of worth once the stages `again` are run again.

        SeqKD's answers stay: they are checked against the configuration, and may have taken long. But with another
        teacher or other prompts they are of no use.
        """
        folders = []
        for stage in again:
            folders.append(stage.output)
            sources = [stage.values.get(name) for name in ("teacher_model_name_or_path", "dataset_name")]
            if stage.answers is not None and any(each in again for each in self._earlier(stage, sources)):
                folders.append(stage.answers)
        return folders

    def problem(self, stage: Stage) -> str | None:
        """Why the stage's folder can be neither its result nor gone on with.

        It may hold the result of another configuration (the differences are named) or of other inputs, or files of
        unknown origin.
        """
        marker = stage.marker
        if marker is None:
            # what is not a training looks at its folder by itself
            if stage.subcommand not in TRAINING or not stage.output.is_dir() or not any(stage.output.iterdir()):
                return None
            return f"{stage.output} is not empty, and no recipe has written it"
        if changed := _difference(with_first_names(_parser(stage.subcommand), marker["config"]), stage.values):
            return f"{stage.output} was made with {changed}"
        for each in self.inputs(stage):
            if marker["inputs"].get(str(each.output)) != each.digest():
                return f"{stage.output} builds on {each.output}, which has been made again since"
        return None

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage's folder holds its result."""
        return stage.is_finished and self.problem(stage) is None

    def check(self, stage: Stage) -> None:
        """Check that the stage can be taken as it is, gone on with, or begun.

        Raises:
            ValueError: if there is a [`problem`].
        """
        if (problem := self.problem(stage)) is not None:
            raise UserError(f"stage {stage.name}: {problem}. {how_to_mend(stage)}")


def how_to_mend(stage: Stage) -> str:
    """The two ways out where a stage's folder does not fit."""
    return (
        f"`--rerun {stage.name}` moves the folder aside and runs the stage, and what builds on it, again; "
        f"`--accept {stage.name}` takes what is there as the result."
    )


def move_aside(folder: Path) -> Path | None:
    """Rename the folder, if there is one, to `FOLDER.replaced-N`."""
    if not folder.exists():
        return None
    free = (folder.with_name(f"{folder.name}.replaced-{number}") for number in count(1))
    target = next(path for path in free if not path.exists())
    os.replace(folder, target)
    return target


def read_recipe(folder: Path) -> Recipe:
    """Read `recipe.yaml` of a folder and the YAMLs of its stages, and check all of them.

    Raises:
        ValueError: with file and line; or if two stages would write to one folder, or one inside that of another.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no recipe.yaml in this folder. Name one such as recipes/gpt2-120m-from-1.5b.")
    content, node = read_yaml(path)
    if not isinstance(content, dict) or content.keys() != {"stages", "evaluate"}:
        raise UserError(f"{path}: expected `stages` and `evaluate`.")
    if not isinstance(content["stages"], dict):
        place = f"{path}:{line_of(node, 'stages')}"
        raise UserError(f"{place}: stages: expected lines of `NAME: SUBCOMMAND`, or `NAME: SUBCOMMAND FILE.yaml`.")
    stages = [
        _stage(folder, name, command, f"{path}:{line_of(node, 'stages', str(name))}: stages: {name}")
        for name, command in content["stages"].items()
    ]
    evaluation = content["evaluate"]
    _check_evaluation(evaluation, stages, path, node)
    config, report = folder / evaluation["config"], Path(os.path.normpath(evaluation["output_dir"]))
    values = _read(config, "evaluate")
    by_name = {stage.name: stage for stage in stages}
    for name in evaluation["models"]:
        more = {"model": str(by_name[name].output)}
        stages.append(Stage(f"evaluate:{name}", "evaluate", config, values | more, report / name))
    recipe = Recipe(folder, stages, evaluation.get("baseline"), evaluation.get("teacher"), report)
    _check_folders(path, recipe)
    return recipe


def _stage(folder: Path, name: Any, command: Any, place: str) -> Stage:
    if not isinstance(name, str) or name == "evaluate" or {":", "/"} & set(name):
        raise UserError(f"{place}: not a name for a stage. Take a word (not `evaluate`) without : and /.")
    subcommand, _, file = str(command).partition(" ")
    if subcommand not in _SUBCOMMANDS:
        raise UserError(f"{place}: {subcommand!r} is none of {', '.join(_SUBCOMMANDS)}.")
    config = Path(os.path.normpath(folder / (file or f"{name}.yaml")))
    values = _read(config, subcommand)
    if not values.get("output_dir"):
        raise UserError(f"{config}: output_dir is missing, which a recipe needs.")
    return Stage(name, subcommand, config, values, Path(os.path.normpath(str(values["output_dir"]))))


def _check_evaluation(evaluation: Any, stages: list[Stage], path: Path, node: yaml.Node) -> None:
    needed, allowed = {"config", "models", "output_dir"}, {"baseline", "teacher"}
    if not isinstance(evaluation, dict) or not needed <= evaluation.keys() <= needed | allowed:
        raise UserError(
            f"{path}:{line_of(node, 'evaluate')}: evaluate: expected `config`, `models` and `output_dir`, at most "
            "`baseline` and `teacher` more."
        )

    def place(name: str) -> str:
        return f"{path}:{line_of(node, 'evaluate', name)}: evaluate"

    for name in ("config", "output_dir"):
        if not isinstance(evaluation[name], str) or not evaluation[name]:
            raise UserError(f"{place(name)}: {name}: expected a path, got {evaluation[name]!r}.")
    models = evaluation["models"]
    if not isinstance(models, list) or not models:
        raise UserError(f"{place('models')}: models: expected a list of stages, got {models!r}.")
    made = [stage.name for stage in stages if stage.subcommand in _MODELS]
    for name in models:
        if name not in made:
            raise UserError(
                f"{place('models')}: models: no stage {name!r} makes a model. Choose from {', '.join(made)}."
            )
        if models.count(name) > 1:
            raise UserError(f"{place('models')}: models: {name!r} stands there twice.")
    for name in allowed & evaluation.keys():
        if evaluation[name] not in (None, *models):
            raise UserError(f"{place(name)}: {evaluation[name]!r} is none of the models.")


def _check_folders(path: Path, recipe: Recipe) -> None:
    """Check that no stage writes to the folder of another: it would go on from the other's checkpoint."""
    outputs = [(stage.name, stage.output) for stage in recipe.stages]
    pairs = list(combinations(outputs, 2))
    for stage in recipe.stages:
        if stage.answers is not None:  # two may share them, and they may lie in the stage's own folder
            theirs = (f"{stage.name}'s teacher_data_dir", stage.answers)
            pairs += [(theirs, (name, output)) for name, output in outputs if name != stage.name]
        if stage.subcommand != "evaluate" and _contains(stage.output, recipe.report):
            pairs.append((("evaluate's output_dir", recipe.report), (stage.name, stage.output)))
    for (one, first), (other, second) in pairs:
        if _contains(first, second) or _contains(second, first):
            raise UserError(
                f"{path}: {one} and {other} would write to one place: {first} and {second}. Give each a folder of its "
                "own, none inside another."
            )


def _contains(folder: Path, other: Path) -> bool:
    return other.resolve().is_relative_to(folder.resolve())


def _read(config: Path, subcommand: str) -> dict[str, Any]:
    parser = _parser(subcommand)
    if isinstance(parser, Parser):
        check_config(parser, config)
    else:
        check_plain_yaml(parser, config)
    return with_first_names(parser, read_yaml(config)[0])


def _parser(subcommand: str) -> argparse.ArgumentParser:
    return import_module(f".{subcommand.replace('-', '_')}", __package__).build_parser()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return ", ".join(f"{name}={found.get(name)!r} (now {wanted.get(name)!r})" for name in names)
