"""Keep tokens, keys and passwords out of logs and run records."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

# Listed, since a pattern such as `*_token` would also match eos_token
_FIELDS = {"hub_token", "push_to_hub_token", "token", "use_auth_token", "api_key"}
_VARIABLES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_MIN_SECRET_LENGTH = 8  # shorter values may be numbers or common words, which would be replaced everywhere


def is_secret(name: str) -> bool:
    """Return whether a field, an option (without dashes) or an environment variable holds a secret, by its name."""
    return name in _FIELDS or (name.isupper() and _VARIABLES.search(name) is not None)


def known_secrets() -> set[str]:
    """Return the values of environment variables that hold secrets."""
    return {
        value for name, value in os.environ.items() if is_secret(name.upper()) and len(value) >= _MIN_SECRET_LENGTH
    }


def redact(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Replace secrets in texts, lists and mappings, at any depth.

    Secrets are the values of keys that [`is_secret`], `secrets` wherever they occur in a text, and logins in URLs.

    Args:
        value: text, list or mapping; other values are returned as they are.
        secrets (`Iterable[str]`, *optional*): texts to replace; [`known_secrets`] by default.
    """
    secrets = known_secrets() if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret(str(key)) and item is not None else redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [redact(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, REDACTED)
    return _LOGIN_IN_URL.sub(f"{REDACTED}@", value)


def redact_command(words: Sequence[str]) -> list[str]:
    """Replace the values of options that hold secrets in the words of a command line.

    Both `--token VALUE` and `--token=VALUE` are recognised.
    """
    redacted: list[str] = []
    hide_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = word.startswith("--") and is_secret(name.removeprefix("--").replace("-", "_"))
        if hide_next and not word.startswith("--"):
            redacted.append(REDACTED)
        else:
            redacted.append(f"{name}={REDACTED}" if secret and equals else word)
        hide_next = secret and not equals
    return redact(redacted)
