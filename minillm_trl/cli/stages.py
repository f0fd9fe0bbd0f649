"""The stages of a recipe: what they run, what they build on, and whether they are done."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from .arguments import Parser, check_config, check_plain_yaml

TRAINING = ("sft", "kd", "seqkd", "minillm")
_SUBCOMMANDS = ("prepare-data", *TRAINING)
_MARKER = "stage.json"


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
    def marker(self) -> dict[str, Any] | None:
        """What the stage's folder says of the run in it: configuration, inputs, and when it was finished."""
        path = self.output / _MARKER
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def is_finished(self) -> bool:
        return self.marker is not None and self.marker["finished"] is not None

    def mark(self, inputs: list["Stage"], finished: bool) -> None:
        """Write the marker."""
        self.output.mkdir(parents=True, exist_ok=True)
        marker = {
            "subcommand": self.subcommand,
            "config": self.values,
            "inputs": {str(each.output): each.digest() for each in inputs},
            "finished": datetime.now(UTC).isoformat() if finished else None,
        }
        temporary = self.output / f".{_MARKER}.partial"
        temporary.write_text(json.dumps(marker, indent=1), encoding="utf-8")
        os.replace(temporary, self.output / _MARKER)

    def digest(self) -> str | None:
        """Of the marker, so another one for each run; None before the stage is finished."""
        return hashlib.sha256(json.dumps(self.marker).encode()).hexdigest() if self.is_finished else None

    def move_aside(self) -> Path | None:
        """Rename the stage's folder, if there is one, to `FOLDER.replaced-N`."""
        if not self.output.exists():
            return None
        free = (self.output.with_name(f"{self.output.name}.replaced-{number}") for number in count(1))
        target = next(path for path in free if not path.exists())
        os.replace(self.output, target)
        return target


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
        paths = [Path(os.path.normpath(text)) for text in _texts(stage.values)]
        earlier = self.stages[: self.stages.index(stage)]
        return [each for each in earlier if any(each.output == path or each.output in path.parents for path in paths)]

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
                raise ValueError(
                    f"{self.folder} has no stage {name!r}. There are: {known}; `evaluate` is all of them."
                )
        return [stage for stage in self.stages if stage.name in names or stage.name.split(":")[0] in names]

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage's folder holds its result.

        Raises:
            ValueError: if it holds something else: the result of another configuration or of other inputs, with the
                first difference, or files of unknown origin.
        """
        marker = stage.marker
        if marker is None:
            # what is not a training looks at its folder by itself
            if stage.subcommand not in TRAINING or not stage.output.is_dir() or not any(stage.output.iterdir()):
                return False
            problem = f"{stage.output} is not empty, and no recipe has written it"
        elif changed := _difference(marker["config"], stage.values):
            problem = f"{stage.output} was made with {changed}"
        elif stale := [
            str(each.output) for each in self.inputs(stage) if marker["inputs"].get(str(each.output)) != each.digest()
        ]:
            problem = f"{stage.output} builds on {stale[0]}, which has been made again since"
        else:
            return marker["finished"] is not None
        raise ValueError(
            f"stage {stage.name}: {problem}. `--rerun {stage.name}` moves the folder aside and runs the stage, and "
            f"what builds on it, again; `--accept {stage.name}` takes what is there as the result."
        )


def read_recipe(folder: Path) -> Recipe:
    """Read `recipe.yaml` of a folder and the YAMLs of its stages, and check all of them.

    Raises:
        ValueError: with file and, for an unknown option or a wrong value, line.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no recipe.yaml in this folder. Name one such as recipes/gpt2-120m-from-1.5b.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.keys() != {"stages", "evaluate"}:
        raise ValueError(f"{path}: expected `stages` and `evaluate`.")
    if not isinstance(content["stages"], dict):
        raise ValueError(f"{path}: stages: expected lines of `NAME: SUBCOMMAND`, or `NAME: SUBCOMMAND FILE.yaml`.")
    stages = [_stage(path, name, command) for name, command in content["stages"].items()]
    evaluation = content["evaluate"]
    needed, allowed = {"config", "models", "output_dir"}, {"baseline", "teacher"}
    if not isinstance(evaluation, dict) or not needed <= evaluation.keys() <= needed | allowed:
        raise ValueError(
            f"{path}: evaluate: expected `config`, `models` and `output_dir`, at most `baseline` and `teacher` more."
        )
    report = Path(evaluation["output_dir"])
    config = folder / evaluation["config"]
    values = _read(config, "evaluate")
    by_name = {stage.name: stage for stage in stages}
    if unknown := {evaluation.get("baseline"), evaluation.get("teacher")} - {None, *evaluation["models"]}:
        raise ValueError(f"{path}: evaluate: {unknown.pop()!r} is none of the models.")
    for name in evaluation["models"]:
        if name not in by_name:
            raise ValueError(f"{path}: evaluate: models: there is no stage {name!r}.")
        more = {"model": str(by_name[name].output)}
        stages.append(Stage(f"evaluate:{name}", "evaluate", config, values | more, report / name))
    return Recipe(folder, stages, evaluation.get("baseline"), evaluation.get("teacher"), report)


def _stage(recipe: Path, name: str, command: str) -> Stage:
    subcommand, _, file = str(command).partition(" ")
    if subcommand not in _SUBCOMMANDS:
        raise ValueError(f"{recipe}: stages: {name}: {subcommand!r} is none of {', '.join(_SUBCOMMANDS)}.")
    config = Path(os.path.normpath(recipe.parent / (file or f"{name}.yaml")))
    values = _read(config, subcommand)
    if not values.get("output_dir"):
        raise ValueError(f"{config}: output_dir is missing, which a recipe needs.")
    return Stage(name, subcommand, config, values, Path(os.path.normpath(values["output_dir"])))


def _read(config: Path, subcommand: str) -> dict[str, Any]:
    parser = import_module(f".{subcommand.replace('-', '_')}", __package__).build_parser()
    if isinstance(parser, Parser):
        check_config(parser, config)
    else:
        check_plain_yaml(parser, config)
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return ", ".join(f"{name}={found.get(name)!r} (now {wanted.get(name)!r})" for name in names)
