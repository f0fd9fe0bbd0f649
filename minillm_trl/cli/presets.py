"""The option `preset`: its fields become the defaults of a parser, so that values given by the user win."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..presets import PRESETS, preset
from .option_names import given_options


@dataclass
class PresetArguments:
    """A method by name (docs/family.md)."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Set the fields of the objective as this method does. Fields that you set yourself win.",
            "choices": list(PRESETS),
        },
    )


def apply_preset(parser: argparse.ArgumentParser, from_file: Mapping[str, Any], argv: Sequence[str]) -> str | None:
    """Make the fields of the preset, if one is named, the defaults of the parser.

    Args:
        parser (`argparse.ArgumentParser`): parser of a subcommand; its defaults are changed.
        from_file (`Mapping[str, Any]`): values of the YAML file, by the first names of the options.
        argv (`Sequence[str]`): words of the command line, which override the file.

    Returns:
        `str`: which fields the preset sets, and which the user has set instead; None without a preset.
    """
    given = {option.action.dest: option.values for option in given_options(parser, argv) if option.action is not None}
    name = given["preset"][0] if given.get("preset") else from_file.get("preset")
    if name not in PRESETS or not any(action.dest == "preset" for action in parser._actions):
        return None  # the parser reports an unknown name
    fields = preset(name)
    parser.set_defaults(**fields)
    own = [field for field in fields if field in given or field in from_file]
    text = f"preset {name}: " + ", ".join(f"{key}={value}" for key, value in fields.items() if key not in own)
    return f"{text}. Your own {', '.join(own)} instead of the preset's." if own else f"{text}."
