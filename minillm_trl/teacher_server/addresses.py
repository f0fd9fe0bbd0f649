"""Addresses of teacher servers, and the key that they may ask for."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files.addresses import check_address

if TYPE_CHECKING:
    from ..config import MiniLLMConfig

API_KEY = "TEACHER_SERVER_API_KEY"  # environment variable


def is_address(teacher: object) -> bool:
    """Return whether a value of `teachers` names servers: an address, or a list of addresses."""
    first = teacher[0] if isinstance(teacher, list | tuple) and teacher else teacher
    return isinstance(first, str) and first.startswith(("http://", "https://"))


def served_names(args: "MiniLLMConfig") -> list[str]:
    """Return the names of those of several teachers that are on servers."""
    assert not isinstance(args.teachers, str)  # GRPOConfig parses it
    return [name for name, teacher in (args.teachers or {}).items() if is_address(teacher)]


def base_urls(given: str | Sequence[str], name: str) -> list[str]:
    """Return the addresses of the servers of one teacher, see [`base_url`]; `name` is the option.

    Raises:
        UserError: if there is none, or one occurs twice.
    """
    urls = [given] if isinstance(given, str) else list(given)
    found = [base_url(url, name) for url in urls]
    if not urls or len(set(found)) < len(urls):
        raise UserError(f"{name}={urls} must name one server or several different ones.")
    return found


def base_url(url: str, name: str = "teacher_server_url") -> str:
    """Return the address of a server without a trailing slash or `/v1`; messages begin with `name`.

    Raises:
        UserError: if it is not an http(s) URL, or may contain a secret, which the message does not show.
    """
    advice = f"Put a key into the environment variable {API_KEY}."
    url = check_address(url, name, "http://localhost:8000", advice)
    return url.removesuffix("/v1").rstrip("/")


def authorization() -> dict[str, str]:
    """Return the header with the key from the environment, if there is one."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}
