"""Hand a training subcommand over to `accelerate launch`."""

import os
from functools import cache
from pathlib import Path

# Set for the processes that a hand-over starts, so that they do not hand themselves over again.
LAUNCHED = "MINILLM_TRL_LAUNCHED"


@cache
def launch_flags() -> set[str]:
    """Names of the options of `accelerate launch` (without dashes), and `accelerate_config`."""
    from accelerate.commands.launch import launch_command_parser  # takes seconds, and few commands need it

    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return {"accelerate_config"} | {option.removeprefix("--") for option in options if option.startswith("--")}


def accelerate_config_path(name: str) -> Path:
    """The file that `--accelerate_config` names.

    Args:
        name (`str`): a file, or the name of one of `recipes/accelerate_configs` without `.yaml`.

    Raises:
        ValueError: if it is neither, with the names that there are.
    """
    if Path(name).is_file():
        return Path(name)
    package = Path(__file__).resolve().parents[1]
    # in a wheel the recipes lie inside the package, in a source tree beside it
    folders = [package / "recipes" / "accelerate_configs", package.parent / "recipes" / "accelerate_configs"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ValueError(f"--accelerate_config {name!r} is neither a file nor one of {', '.join(names)}.")


def hand_over(subcommand: str, argv: list[str], flags: list[str]) -> int:
    """Run `accelerate launch <flags> -m minillm_trl <subcommand> <argv without flags>`.

    Args:
        subcommand (`str`): a training subcommand.
        argv (`list[str]`): its arguments.
        flags (`list[str]`): flags for `accelerate launch` as found in `argv` and the YAML; `--accelerate_config NAME`
            becomes `--config_file FILE`.

    Returns:
        `int`: exit status.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    rest = _without(argv, flags)
    if "--accelerate_config" in flags:
        index = flags.index("--accelerate_config")
        if index + 1 == len(flags):
            raise ValueError("--accelerate_config needs a name or a file.")
        config = accelerate_config_path(flags[index + 1])
        flags = ["--config_file", str(config), *flags[:index], *flags[index + 2 :]]
    os.environ[LAUNCHED] = "1"
    arguments = launch_command_parser().parse_args([*flags, "--module", "minillm_trl", subcommand, *rest])
    launch_command(arguments)
    return 0


def _without(argv: list[str], flags: list[str]) -> list[str]:
    """`argv` without the flags and their values, which stand in it in the same order after those of the YAML."""
    wanted = set(flags)
    rest, skip = [], False
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if skip:
            skip = False
        elif word.startswith("--") and word in wanted:
            skip = following in wanted and not following.startswith("--")
        else:
            rest.append(word)
    return rest
