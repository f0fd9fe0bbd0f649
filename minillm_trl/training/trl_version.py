"""Which versions of TRL this package runs on: it overrides private members of GRPOTrainer, which move between them."""

import warnings
from importlib.metadata import version

# Minor versions whose contract tests have been run, see tests/tools/trl_matrix.py
TESTED = ("1.16",)


def check_trl_version(installed: str | None = None) -> None:
    """Check the installed version of TRL, before anything is imported from it.

    Args:
        installed (`str`, *optional*): the version to check; that of the installed package by default.

    Raises:
        ImportError: for another major version, or one older than those tested.
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
