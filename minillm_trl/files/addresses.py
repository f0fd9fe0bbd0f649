"""Check the address of a server that the user names."""

from urllib.parse import urlsplit

from ..errors import UserError


def check_address(url: str, name: str, example: str, advice: str) -> str:
    """Check an address, and return it without trailing slashes.

    Args:
        url (`str`): the address.
        name (`str`): the option that it comes from, with which messages begin.
        example (`str`): a right address.
        advice (`str`): where to put a key instead.

    Raises:
        UserError: if it is not an http(s) URL, or may contain a secret, which the message does not show.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
    except ValueError:
        raise UserError(f"{name} is not a URL. Give one like {example}.") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(f"{name} must not contain credentials, a query or a fragment. {advice}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{name} {url} is not an http or https URL. Give one like {example}.")
    return url.rstrip("/")
