"""Addresses of teacher servers, and the key that they may ask for."""

import os
from urllib.parse import urlsplit

from ..errors import UserError

API_KEY = "TEACHER_SERVER_API_KEY"  # environment variable


def base_url(url: str) -> str:
    """Return the address of a server without a trailing slash or `/v1`.

    Raises:
        UserError: if it is not an http(s) URL, or may contain a secret, which the message does not show.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
    except ValueError:
        raise UserError("teacher_server_url is not a URL. Give one like http://localhost:8000.") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            "teacher_server_url must not contain credentials, a query or a fragment. Put a key into the environment "
            f"variable {API_KEY}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"teacher_server_url={url!r} is not an http or https URL. Give one like http://localhost:8000."
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization() -> dict[str, str]:
    """Return the header with the key from the environment, if there is one."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}
