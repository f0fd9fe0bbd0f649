"""Addresses of teacher servers, and the key that they may ask for."""

import os

from ..files.addresses import check_address

API_KEY = "TEACHER_SERVER_API_KEY"  # environment variable


def base_url(url: str) -> str:
    """Return the address of a server without a trailing slash or `/v1`.

    Raises:
        UserError: if it is not an http(s) URL, or may contain a secret, which the message does not show.
    """
    advice = f"Put a key into the environment variable {API_KEY}."
    url = check_address(url, "teacher_server_url", "http://localhost:8000", advice)
    return url.removesuffix("/v1").rstrip("/")


def authorization() -> dict[str, str]:
    """Return the header with the key from the environment, if there is one."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}
