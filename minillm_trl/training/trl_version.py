"""Check TRL's version: this package overrides private members of GRPOTrainer, which change between versions."""

import warnings
from importlib.metadata import version

# Minor versions that pass the contract tests, see tests/tools/trl_matrix.py
TESTED = ("1.16",)


def check_trl_version(installed: str | None = None) -> None:
    """Check the installed version of TRL, before anything is imported from it.

    Args:
        installed (`str`, *optional*): the version to check; by default that of the installed package.

    Raises:
        ImportError: for another major version, or a version older than the tested ones.
    """
    installed = installed or version("trl")
    minor = ".".join(installed.split(".")[:2])
    if minor in TESTED:
        return
    advice = f"minillm_trl is tested with TRL {', '.join(TESTED)}; installed is {installed}."
    oldest = tuple(map(int, TESTED[0].split(".")))
    found = tuple(int(part) if part.isdigit() else 0 for part in minor.split("."))
    if found[0] != oldest[0] or found < oldest:
        raise ImportError(f"{advice} Install a tested one: pip install 'trl~={TESTED[-1]}.0'")
    warnings.warn(
        f"{advice} If something breaks, install a tested one: pip install 'trl~={TESTED[-1]}.0'", stacklevel=3
    )
