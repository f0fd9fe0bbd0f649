"""Asks an OpenAI-compatible endpoint for chat completions, again where a failure may pass."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx2

from ..errors import UserError

LONGEST_BACKOFF = 60.0
LONGEST_WAIT = 300.0  # that a server may ask for; what it wants beyond is for another day

_TRANSIENT = (408, 429)  # and all of 500 and above
_REFUSED = (400, 413, 422)
_SHOWN = 200  # characters of what a server says in an error


class ChatError(UserError):
    """The endpoint gives no completion. The message says why, and what to do."""


class RequestRefused(ChatError):
    """The endpoint refuses this request for what is in it (400, 413, 422); others may pass."""


class _Transient(Exception):
    """A failure that may pass; `wait` are the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class ChatReply:
    """A completion.

    Attributes:
        text (`str`): of the first choice, empty if it has none.
        model (`str`, *optional*): the model that answered, as the endpoint names it.
        prompt_tokens, completion_tokens (`int`): as the endpoint counts them, 0 if it does not.
        retries (`int`): failed tries before it.
    """

    text: str
    model: str | None
    prompt_tokens: int
    completion_tokens: int
    retries: int


class ChatClient:
    """Client of one endpoint; [`complete`] may be called from several threads.

    Args:
        base_url (`str`): the endpoint without `/chat/completions`, such as `http://localhost:8000/v1`.
        api_key (`str`, *optional*): sent as a bearer token, and struck out of all that the endpoint says.
        key_name (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): environment variable of the key, for messages.
        timeout (`float`, *optional*, defaults to `120.0`): seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `6`): tries after the first one of a request.
        sleep (`Callable`, *optional*): waits for some seconds; by default until [`stop`] at most.

    Raises:
        ValueError: if the address or the key cannot be used; without the key.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        key_name: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        max_retries: int = 6,
        sleep: Callable[[float], object] | None = None,
    ):
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise UserError(f"{key_name} holds characters that no HTTP header carries. Set it to the key alone.")
        self.url = f"{check_base_url(base_url)}/chat/completions"
        self._api_key = api_key
        self._key_name = key_name
        self._timeout = timeout
        self._max_retries = max_retries
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx2.Client(headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """Let no request be begun or tried again, from any thread; those on their way are still answered."""
        self._stopped.set()

    def complete(self, body: dict[str, Any]) -> ChatReply:
        """Ask for a completion; after 408, 429, 5xx, a time-out, a lost connection or a broken reply again.

        Args:
            body (`dict`): of the request: `model`, `messages` and parameters.

        Raises:
            RequestRefused: if the endpoint refuses what the request holds.
            ChatError: if it refuses all, or failed once more than `max_retries` times.
        """
        retries = 0
        while not self._stopped.is_set():
            try:
                return self._try(body, retries)
            except _Transient as failure:
                self._wait(retries, failure)
            retries += 1
        raise ChatError(f"{self.url} was not asked: stopped before.")

    def _wait(self, retries: int, failure: _Transient) -> None:
        if retries == self._max_retries:
            raise ChatError(
                f"{self.url} failed {retries + 1} times, last with {failure}. Check that it runs and that --base_url "
                "is right, or ask it for less at a time with --concurrency."
            ) from failure
        if failure.wait is not None and failure.wait > LONGEST_WAIT:
            raise ChatError(f"{self.url} asks to wait for {failure.wait:.0f} s ({failure}).") from failure
        self._sleep(seconds_before_retry(retries, failure.wait))

    def _try(self, body: dict[str, Any], retries: int) -> ChatReply:
        try:
            response = self._client.post(self.url, json=body)
        except httpx2.TimeoutException as error:
            raise _Transient(f"no answer within {self._timeout:g} s") from error
        except httpx2.RequestError as error:
            raise _Transient(f"{type(error).__name__} ({error})") from error
        status = response.status_code
        if status in _TRANSIENT or status >= 500:
            raise _Transient(self._said(response), _retry_after(response.headers.get("Retry-After")))
        if status in _REFUSED:
            raise RequestRefused(f"{self.url} refuses a request: {self._said(response)}.")
        if status in (401, 403):
            fix = f"Check the key in {self._key_name}" if self._api_key else f"No key was sent: set {self._key_name}"
            raise ChatError(f"{self.url} lets nobody in: {self._said(response)}. {fix}.")
        if status == 404:
            raise ChatError(
                f"{self.url} is not there, or has no model {body.get('model')!r}: {self._said(response)}. Check "
                "--base_url, which often ends with /v1, and --judge_model."
            )
        if status != 200:
            raise ChatError(f"{self.url} does not answer as an OpenAI-compatible endpoint: {self._said(response)}.")
        return self._read(response, retries)

    def _read(self, response: httpx2.Response, retries: int) -> ChatReply:
        try:
            reply = response.json()
            text = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
            tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
            if not isinstance(text, str | None):
                raise TypeError(f"content is a {type(text).__name__}")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Transient(f"a reply that is no chat completion: {self._said(response)}") from error
        return ChatReply(self._without_key(text or ""), reply.get("model"), *tokens, retries)

    def _said(self, response: httpx2.Response) -> str:
        """Status and message of a response, short and without the key."""
        try:
            text = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            text = response.text
        text = " ".join(self._without_key(text).split()).rstrip(".")  # before it is cut, which would leave a part
        return f"HTTP {response.status_code}, {text[:_SHOWN]!r}" if text else f"HTTP {response.status_code}"

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "(key)") if self._api_key else text


def check_base_url(base_url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: if it is no address of an endpoint, or holds what may be a secret, which is not shown.
    """
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, UnicodeEncodeError) as error:
        raise UserError("--base_url is no address. Give one like http://localhost:8000/v1.") from error
    if url.userinfo or url.query or url.fragment:
        raise UserError("--base_url must end with its path. A key goes into an environment variable: --api_key_env.")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--base_url {base_url} is no http or https address. Give one like http://localhost:8000/v1.")
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise UserError(f"--base_url {base_url}: leave out /chat/completions, which is added.")
    return base_url.rstrip("/")


def seconds_before_retry(retries: int, asked: float | None) -> float:
    """How long to wait: as long as the server asks for, or 1, 2, 4, ... up to 60 seconds; both with jitter.

    Args:
        retries (`int`): tries again so far.
        asked (`float`, *optional*): seconds that the server asks for. The wait is up to a second longer; without
            them it is the half of the power of two or more.
    """
    if asked is not None:
        return asked + random.random()
    return min(LONGEST_BACKOFF, 2.0**retries) * random.uniform(0.5, 1.0)


def _retry_after(header: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which may also be a date; None if there is none that can be read."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return None
