"""The stages of a recipe: their commands, their dependencies, and whether they are done."""

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
from .option_values import read_config, with_first_names

TRAINING = ("sft", "kd", "seqkd", "minillm")
_SUBCOMMANDS = ("prepare-data", "shrink", *TRAINING)
_MODELS = ("shrink", *TRAINING)  # their models can be evaluated
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
        name (`str`): name for `--stages`.
        subcommand (`str`): subcommand of `minillm-trl`.
        config (`Path`): the subcommand's YAML.
        values (`dict`): settings from the YAML and the recipe; if they change, the stage is no longer done.
        output (`Path`): the folder that it writes to, relative to the working directory.
    """

    name: str
    subcommand: str
    config: Path
    values: dict[str, Any]
    output: Path

    @property
    def words(self) -> list[str]:
        """Return the arguments of the subcommand."""
        if self.subcommand != "evaluate":
            return ["--config", str(self.config)]
        return ["--config", str(self.config), "--model", self.values["model"], "--output_dir", str(self.output)]

    @property
    def answers(self) -> Path | None:
        """Return the folder where SeqKD keeps the teacher's answers; None for other subcommands."""
        if self.subcommand != "seqkd":
            return None
        folder = self.values.get("teacher_data_dir") or default_teacher_data_dir(str(self.output))
        return Path(os.path.normpath(folder))

    @property
    def folders(self) -> list[Path]:
        """Return all folders that the stage writes to."""
        return [self.output] if self.answers is None else [self.output, self.answers]

    @property
    def marker(self) -> dict[str, Any] | None:
        """Return the marker in the stage's folder: configuration, inputs and time of completion of the run in it."""
        path = self.output / _MARKER
        hint = "Delete this file; `--accept STAGE` then accepts the contents of the folder as the stage's result."
        return read_json(path, _Marker, hint) if path.is_file() else None

    @property
    def is_finished(self) -> bool:
        """Return whether the marker records a finished run."""
        return self.marker is not None and self.marker["finished"] is not None

    @property
    def is_accepted(self) -> bool:
        """Return whether `--accept` took the folder as the result."""
        return self.marker is not None and self.is_finished and self.marker.get("accepted", False)

    def mark(self, inputs: list["Stage"], finished: bool, accepted: bool = False) -> None:
        """Write the marker into the stage's folder."""
        make_folder(self.output)
        marker = {
            "subcommand": self.subcommand,
            "config": self.values,
            "inputs": {str(source.output): source.digest() for source in inputs},
            "finished": datetime.now(UTC).isoformat() if finished else None,
            "accepted": accepted,
        }
        write_whole(self.output / _MARKER, json.dumps(marker, indent=1))

    def digest(self) -> str | None:
        """Return the SHA-256 of the marker, which differs for each run; None before the stage is finished."""
        return hashlib.sha256(json.dumps(self.marker).encode()).hexdigest() if self.is_finished else None


@dataclass(frozen=True)
class Recipe:
    """The stages of a recipe in order, evaluations last, and the names of baseline and teacher."""

    folder: Path
    stages: list[Stage]
    baseline: str | None
    teacher: str | None
    report: Path

    def inputs(self, stage: Stage) -> list[Stage]:
        """Return the earlier stages whose folders the stage's configuration names."""
        return self._earlier(stage, stage.values)

    def _earlier(self, stage: Stage, values: Any) -> list[Stage]:
        paths = [Path(os.path.normpath(text)) for text in _texts(values)]
        return [
            earlier
            for earlier in self.stages[: self.stages.index(stage)]
            if any(folder == path or folder in path.parents for folder in earlier.folders for path in paths)
        ]

    def with_inputs(self, stages: list[Stage]) -> list[Stage]:
        """Return the stages and all stages they build on, in order."""
        found = list(stages)
        for stage in reversed(self.stages):
            if stage in found:
                found += [source for source in self.inputs(stage) if source not in found]
        return [stage for stage in self.stages if stage in found]

    def with_dependents(self, stages: list[Stage]) -> list[Stage]:
        """Return the stages and all stages that build on them, in order."""
        found: list[Stage] = []
        for stage in self.stages:
            if stage in stages or any(source in found for source in self.inputs(stage)):
                found.append(stage)
        return found

    def named(self, names: list[str]) -> list[Stage]:
        """Return stages by name; `evaluate` names all evaluations.

        Raises:
            ValueError: for an unknown name.
        """
        for name in names:
            if name != "evaluate" and name not in [stage.name for stage in self.stages]:
                known = ", ".join(stage.name for stage in self.stages)
                raise UserError(
                    f"{self.folder} has no stage {name!r}. Choose from {known}; `evaluate` is all evaluations."
                )
        return [stage for stage in self.stages if stage.name in names or stage.name.split(":")[0] in names]

    def outdated(self, again: list[Stage]) -> list[Path]:
        """Return the folders made obsolete by rerunning the stages `again`.

        SeqKD's answers may have taken long and are checked against the configuration, so they are kept unless the
        stage that makes the teacher or the prompts is rerun too.
        """
        folders = []
        for stage in again:
            folders.append(stage.output)
            names = ("teacher_model_name_or_path", "dataset_name", "datasets")
            sources = [stage.values.get(name) for name in names]
            if stage.answers is not None and any(earlier in again for earlier in self._earlier(stage, sources)):
                folders.append(stage.answers)
        return folders

    def problem(self, stage: Stage) -> str | None:
        """Return why the stage's folder is neither its result nor a run to resume; None if it is one of them.

        It may hold the result of another configuration (the text names the differences) or of other inputs, or files
        of unknown origin.
        """
        marker = stage.marker
        if marker is None:
            # other subcommands check their folders themselves
            if stage.subcommand not in TRAINING or not stage.output.is_dir() or not any(stage.output.iterdir()):
                return None
            return f"{stage.output} is not empty, and no recipe wrote it"
        if changed := _difference(with_first_names(_parser(stage.subcommand), marker["config"]), stage.values):
            return f"{stage.output} was made with {changed}"
        for source in self.inputs(stage):
            if marker["inputs"].get(str(source.output)) != source.digest():
                return f"{stage.output} builds on {source.output}, which has been made again since"
        return None

    def is_done(self, stage: Stage) -> bool:
        """Return whether the stage's folder holds its result."""
        return stage.is_finished and self.problem(stage) is None

    def check(self, stage: Stage) -> None:
        """Check that the stage is done, or can be resumed or started.

        Raises:
            ValueError: if there is a [`problem`].
        """
        if (problem := self.problem(stage)) is not None:
            raise UserError(f"stage {stage.name}: {problem}. {remedy(stage)}")


def remedy(stage: Stage) -> str:
    """Return the two ways out if a stage's folder does not match the recipe."""
    return (
        f"`--rerun {stage.name}` moves the folder aside and reruns the stage and those that build on it; "
        f"`--accept {stage.name}` accepts its contents as the result."
    )


def move_aside(folder: Path) -> Path | None:
    """Rename the folder, if it exists, to `FOLDER.replaced-N`, and return the new name."""
    if not folder.exists():
        return None
    free = (folder.with_name(f"{folder.name}.replaced-{number}") for number in count(1))
    target = next(path for path in free if not path.exists())
    os.replace(folder, target)
    return target


def read_recipe(folder: Path) -> Recipe:
    """Read `recipe.yaml` of a folder and the YAMLs of its stages, and check all of them.

    Raises:
        ValueError: with file and line; also if two stages would write to one folder, or one inside the other's.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no recipe.yaml in this folder. Name one such as recipes/gpt2-120m-from-1.5b.")
    content, node = read_yaml(path)
    if node is None or not isinstance(content, dict) or content.keys() != {"stages", "evaluate"}:
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
    values = read_config(_parser("evaluate"), config)
    by_name = {stage.name: stage for stage in stages}
    for name in evaluation["models"]:
        more = {"model": str(by_name[name].output)}
        stages.append(Stage(f"evaluate:{name}", "evaluate", config, values | more, report / name))
    recipe = Recipe(folder, stages, evaluation.get("baseline"), evaluation.get("teacher"), report)
    _check_folders(path, recipe)
    return recipe


def _stage(folder: Path, name: Any, command: Any, place: str) -> Stage:
    if not isinstance(name, str) or name == "evaluate" or {":", "/"} & set(name):
        raise UserError(f"{place}: not a name for a stage. Choose a word (not `evaluate`) without : and /.")
    subcommand, _, file = str(command).partition(" ")
    if subcommand not in _SUBCOMMANDS:
        raise UserError(f"{place}: {subcommand!r} is not one of {', '.join(_SUBCOMMANDS)}.")
    config = Path(os.path.normpath(folder / (file or f"{name}.yaml")))
    values = read_config(_parser(subcommand), config)
    if not values.get("output_dir"):
        raise UserError(f"{config}: output_dir is missing; a recipe needs it.")
    return Stage(name, subcommand, config, values, Path(os.path.normpath(str(values["output_dir"]))))


def _check_evaluation(evaluation: Any, stages: list[Stage], path: Path, node: yaml.Node) -> None:
    needed, allowed = {"config", "models", "output_dir"}, {"baseline", "teacher"}
    if not isinstance(evaluation, dict) or not needed <= evaluation.keys() <= needed | allowed:
        raise UserError(
            f"{path}:{line_of(node, 'evaluate')}: evaluate: expected `config`, `models` and `output_dir`, and "
            "optionally `baseline` and `teacher`."
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
            raise UserError(f"{place('models')}: models: {name!r} is listed twice.")
    for name in allowed & evaluation.keys():
        if evaluation[name] not in (None, *models):
            raise UserError(f"{place(name)}: {evaluation[name]!r} is not one of the models.")


def _check_folders(path: Path, recipe: Recipe) -> None:
    """Check that no stage writes to the folder of another: it would resume from the other's checkpoint."""
    outputs = [(stage.name, stage.output) for stage in recipe.stages]
    pairs = list(combinations(outputs, 2))
    for stage in recipe.stages:
        if stage.answers is not None:  # two stages may share answers, and the stage's own folder may contain them
            theirs = (f"{stage.name}'s teacher_data_dir", stage.answers)
            pairs += [(theirs, (name, output)) for name, output in outputs if name != stage.name]
        if stage.subcommand != "evaluate" and _contains(stage.output, recipe.report):
            pairs.append((("evaluate's output_dir", recipe.report), (stage.name, stage.output)))
    for (one, first), (other, second) in pairs:
        if _contains(first, second) or _contains(second, first):
            raise UserError(
                f"{path}: {one} and {other} would write to one place: {first} and {second}. Give each its own "
                "folder, none inside another."
            )


def _contains(folder: Path, other: Path) -> bool:
    return other.resolve().is_relative_to(folder.resolve())


def _parser(subcommand: str) -> argparse.ArgumentParser:
    return import_module(f".{subcommand.replace('-', '_')}", __package__).build_parser()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return ", ".join(f"{name}={found.get(name)!r} (now {wanted.get(name)!r})" for name in names)
