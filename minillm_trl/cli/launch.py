"""Hand a training subcommand over to `accelerate launch`."""

import json
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..files.yaml_files import read_yaml

# Environment variable of the processes that a hand-over starts, so that they do not hand over again
LAUNCHED = "MINILLM_TRL_LAUNCHED"
_FLAGS = "MINILLM_TRL_LAUNCH_FLAGS"  # the hand-over's flags, as JSON
_FILES = {"--accelerate_config", "--config_file"}  # mutually exclusive


def is_launched() -> bool:
    """Return whether a hand-over, `accelerate launch` or `torchrun` (both set LOCAL_RANK) started this process."""
    return os.environ.get(LAUNCHED) == "1" or "LOCAL_RANK" in os.environ


def launched_with() -> dict[str, str | bool]:
    """Return the options of the hand-over that started this process, in the form of YAML; empty without one."""
    flags = json.loads(os.environ.get(_FLAGS, "{}"))
    return {option.removeprefix("--"): True if value is None else value for option, value in flags.items()}


@cache
def launch_options() -> dict[str, bool]:
    """Return the options of the launcher, with dashes, and whether each takes a value."""
    from accelerate.commands.launch import launch_command_parser  # takes seconds to import, and few commands need it

    options = {
        option: action.nargs != 0 for action in launch_command_parser()._actions for option in action.option_strings
    }
    return {"--accelerate_config": True} | {name: value for name, value in options.items() if name.startswith("--")}


def is_launch_option(name: str) -> bool:
    """Return whether an option of this name, without dashes, belongs to the launcher."""
    return f"--{name}" in launch_options()


def read_flags(from_yaml: Sequence[str], from_cli: Sequence[str]) -> dict[str, str | None]:
    """Turn the words that the subcommand's parser did not use into options of `accelerate launch`.

    Args:
        from_yaml (`Sequence[str]`): options and values, alternating; a flag without a value has `"True"` or `"False"`.
        from_cli (`Sequence[str]`): the words of the command line, which override the YAML.

    Returns:
        `dict[str, str | None]`: value of each option, `None` for a flag.

    Raises:
        ValueError: for a word that is neither an option nor its value, and for two configuration files.
    """
    if not from_yaml and not from_cli:
        return {}
    options = launch_options()
    flags: dict[str, str | None] = {}
    given: dict[str, str | None] = {}
    for option, value in zip(from_yaml[::2], from_yaml[1::2], strict=True):
        if options[option]:
            flags[option] = value
        elif value == "True":
            flags[option] = None
        elif value != "False":
            raise UserError(f"{option.removeprefix('--')} is true or false, got {value!r}.")
    words = iter(from_cli)
    for word in words:
        if word not in options:
            raise UserError(f"unexpected {word!r}: it belongs to no option. Quote values that contain spaces.")
        text = next(words, None) if options[word] else None
        if options[word] and text is None:
            raise UserError(f"{word} needs a value.")
        if word in _FILES:
            _check_file(word, text, given)
        given[word] = text
    if _FILES & given.keys():
        flags = {option: value for option, value in flags.items() if option not in _FILES}
    return flags | given


def _check_file(option: str, value: str | None, given: dict[str, str | None]) -> None:
    for other in _FILES & given.keys():
        if (other, given[other]) != (option, value):
            raise UserError(
                f"{other} {given[other]} and {option} {value}: one of these files would be ignored. Drop one of them."
            )


def accelerate_config_path(name: str) -> Path:
    """Return the file that `--accelerate_config` names.

    Args:
        name (`str`): a file, or the name of one of `recipes/accelerate_configs` without `.yaml`.

    Raises:
        ValueError: if it is neither, with the available names.
    """
    if Path(name).is_file():
        return Path(name)
    configs = recipes_folder("accelerate_configs")
    if (configs / f"{name}.yaml").is_file():
        return configs / f"{name}.yaml"
    names = sorted(path.stem for path in configs.glob("*.yaml"))
    raise UserError(f"--accelerate_config {name!r} is neither a file nor one of {', '.join(names)}.")


def recipes_folder(name: str) -> Path:
    """Return a folder of `recipes`, which a wheel has inside the package, and a source tree next to it."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "recipes" / name, package.parent / "recipes" / name
    return inside if inside.is_dir() else beside


def hand_over(subcommand: str, argv: list[str], flags: dict[str, str | None]) -> int:
    """Run `accelerate launch <flags> -m minillm_trl <subcommand> <argv without flags>`.

    Args:
        subcommand (`str`): a training subcommand.
        argv (`list[str]`): its arguments.
        flags (`dict[str, str | None]`): from [`read_flags`]; `--accelerate_config NAME` becomes `--config_file FILE`.

    Returns:
        `int`: exit status: 0, or that of the first process that failed (1 if a signal ended it).

    Raises:
        ValueError: if the file cannot be read, with the line.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    rest, given = _without(argv, flags), json.dumps(flags)
    flags = dict(flags)
    if (name := flags.pop("--accelerate_config", None)) is not None:
        flags["--config_file"] = str(accelerate_config_path(name))
    config, path = {}, flags.get("--config_file")
    if path is not None and not isinstance(config := read_yaml(Path(path))[0], dict):
        raise UserError(f"{path}: not a configuration of `accelerate launch`, which has `name: value` lines.")
    words = [word for pair in flags.items() for word in pair if word is not None]
    arguments = launch_command_parser().parse_args([*words, "--module", "minillm_trl", subcommand, *rest])
    variables = {LAUNCHED: "1", _FLAGS: given}
    if config.get("use_cpu"):  # accelerate passes it on only to a single process
        variables["ACCELERATE_USE_CPU"] = "true"
    with patch_environment(**variables):
        try:
            launch_command(arguments)
        except KeyboardInterrupt as stop:  # the processes get the signal too
            stop.add_note("The training's own message says how to continue.")
            raise
        except subprocess.CalledProcessError as error:  # the process has printed the error
            return max(error.returncode, 0) or 1
        except ChildFailedError as error:
            return max(error.get_first_failure()[1].exitcode, 0) or 1
    return 0


def _without(argv: list[str], flags: dict[str, str | None]) -> list[str]:
    """Return `argv` without the flags and their values."""
    rest, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in flags:
            rest.append(word)
        elif launch_options()[name] and not equals:
            next(words)
    return rest
