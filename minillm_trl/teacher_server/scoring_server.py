"""A `minillm-trl serve-teacher` as the trainer sees it, and the HTTP requests to any server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import torch

from .addresses import API_KEY
from .identity import Scoring, ServerIdentity, TeacherServerError
from .protocol import VERSION, MessageError, Row, decode_answer, encode_rows

_TRANSIENT = (408, 429)  # and every status from 500
_MAX_SHOWN = 300  # characters of a server's message in an error


class TransientError(Exception):
    """A failure worth a retry."""


class UnknownRouteError(TeacherServerError):
    """The server does not have the requested address."""


class ScoringServer(Protocol):
    """A server that scores completions."""

    @property
    def url(self) -> str:
        """Its address."""

    async def identity(self, session: aiohttp.ClientSession) -> ServerIdentity:
        """Ask the server what it serves."""

    async def score(self, session: aiohttp.ClientSession, rows: Sequence[Row], scoring: Scoring) -> list[torch.Tensor]:
        """Return the packed [`~minillm_trl.teacher_server.top_k.TopK`] of each row, `(t, 2K + 1)`.

        Raises:
            TransientError: if the same request may succeed later.
            TeacherServerError: if the server refuses it.
        """


@dataclass(frozen=True)
class MinillmServer:
    """A server started by `minillm-trl serve-teacher` at `url`."""

    url: str

    async def identity(self, session: aiohttp.ClientSession) -> ServerIdentity:
        """Ask the server what it serves.

        Raises:
            TeacherServerError: if it is of another version of the package, whose messages differ.
        """
        advice = "Install the same version of minillm-trl on both sides."
        try:
            identity = ServerIdentity.from_json(await request_json(session, "GET", f"{self.url}/info"))
        except TypeError as error:
            raise TeacherServerError(f"{self.url} describes itself in an unknown way ({error}). {advice}") from error
        if identity.protocol != VERSION:
            which = "an older" if identity.protocol < VERSION else "a newer"
            raise TeacherServerError(
                f"{self.url} runs {which} version of minillm-trl: its protocol is {identity.protocol}, this run's is "
                f"{VERSION}. {advice}"
            )
        return identity

    async def score(self, session: aiohttp.ClientSession, rows: Sequence[Row], scoring: Scoring) -> list[torch.Tensor]:
        """Send the rows, and read the answer."""
        options = {
            "temperature": repr(scoring.temperature),
            "vocab_size": scoring.vocab_size,
            "model": str(scoring.identity.fingerprint),
        }
        if scoring.tokens == "teacher":
            options["top_k"] = scoring.top_k
        body = await request(session, "POST", f"{self.url}/score", params=options, data=encode_rows(rows))
        try:
            return decode_answer(body, rows)
        except MessageError as error:
            raise TransientError(f"a broken answer ({error})") from error


async def request(session: aiohttp.ClientSession, method: str, url: str, **options: Any) -> bytes:
    """Send a request and return the body of the answer.

    Raises:
        TransientError: for a lost connection, a time-out, and a status that a retry may change.
        TeacherServerError: for any other status than 200.
    """
    try:
        async with session.request(method, url, allow_redirects=False, **options) as response:
            body = await response.read()
    except TimeoutError as error:
        raise TransientError(f"no answer within {session.timeout.total:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise TransientError(f"{type(error).__name__} ({error})") from error
    if response.status == 200:
        return body
    text = " ".join(body.decode(errors="replace").split())[:_MAX_SHOWN]
    reply = f"HTTP {response.status}" + (f", {text!r}" if text else "")
    if response.status in _TRANSIENT or response.status >= 500:
        raise TransientError(reply)
    if response.status in (401, 403):
        raise TeacherServerError(f"{url} refuses the key: {reply}. Set the environment variable {API_KEY}.")
    if response.status == 404:
        raise UnknownRouteError(f"{url} does not exist: {reply}. Check teacher_server_url.")
    if response.status == 409:
        raise TeacherServerError(
            f"{url} has another model than at the start of the run: {reply}. Serve the run's teacher, and resume."
        )
    raise TeacherServerError(f"{url} refuses a request: {reply}.")


async def request_json(session: aiohttp.ClientSession, method: str, url: str, **options: Any) -> Any:
    """Send a request like [`request`], and parse the JSON of the answer."""
    body = await request(session, method, url, **options)
    try:
        return json.loads(body)
    except ValueError as error:
        raise TransientError(f"a broken answer ({error})") from error
