"""Keeps tokens, keys and passwords out of what is written about a run."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

_FIELDS = {"hub_token", "push_to_hub_token", "token", "use_auth_token", "api_key"}  # eos_token is none
_VARIABLES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SHORTEST = 8  # a variable may be a number or a word that stands everywhere


def is_secret(name: str) -> bool:
    """Whether a field, an option (without dashes) or a variable of the environment has a secret by its name."""
    return name in _FIELDS or (name.isupper() and _VARIABLES.search(name) is not None)


def known_secrets() -> set[str]:
    """Values of the environment's variables with secrets."""
    return {value for name, value in os.environ.items() if is_secret(name.upper()) and len(value) >= _SHORTEST}


def redact(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Replace secrets in texts, lists and mappings, at any depth.

    Secrets are the values under names of secrets, the values of the environment's variables with such names wherever
    they stand, and the part of a URL before the @.
    """
    secrets = known_secrets() if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret(str(key)) and each is not None else redact(each, secrets)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [redact(each, secrets) for each in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, REDACTED)
    return _LOGIN_IN_URL.sub(f"{REDACTED}@", value)


def redact_command(words: Sequence[str]) -> list[str]:
    """The words of a command line without the values of options that have secrets."""
    redacted, hide_next = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = word.startswith("--") and is_secret(name.removeprefix("--").replace("-", "_"))
        if hide_next and not word.startswith("--"):
            redacted.append(REDACTED)
        else:
            redacted.append(f"{name}={REDACTED}" if secret and equals else word)
        hide_next = secret and not equals
    return redact(redacted)
