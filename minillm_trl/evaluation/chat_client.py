"""Request chat completions from an OpenAI-compatible endpoint with the `openai` client (extra `judge`)."""

import importlib.util
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self

from ..errors import MissingPackageError, UserError
from ..files.addresses import check_address

if TYPE_CHECKING:
    from openai import APIStatusError

MAX_BACKOFF = 60.0
MAX_REQUESTED_WAIT = 300.0  # seconds; give up if the server asks for more

_TRANSIENT = (408, 429)  # and every status from 500
_REFUSED = (400, 413, 422)
_MAX_SHOWN = 200  # characters of a server's message in an error


class ChatError(UserError):
    """The endpoint returns no completion. The message has the cause and the fix."""


class RequestRefused(ChatError):
    """The endpoint refuses the content of this request (400, 413, 422); other requests may pass."""


class _Transient(Exception):
    """A failure worth a retry; `wait` is the number of seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class ChatReply:
    """A completion.

    Attributes:
        text (`str`): content of the first choice; empty if the reply has no content.
        model (`str`, *optional*): the model that answered, as the endpoint names it.
        prompt_tokens, completion_tokens (`int`): as reported by the endpoint; 0 if it reports none.
        retries (`int`): failed attempts before this reply.
    """

    text: str
    model: str | None
    prompt_tokens: int
    completion_tokens: int
    retries: int


class ChatClient:
    """Client of one endpoint. [`complete`] is thread-safe.

    Args:
        base_url (`str`): the endpoint without `/chat/completions`, such as `http://localhost:8000/v1`.
        api_key (`str`, *optional*): sent as a bearer token and redacted in everything that the endpoint returns.
        key_name (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): environment variable of the key, for messages.
        timeout (`float`, *optional*, defaults to `120.0`): seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `6`): attempts after the first.
        sleep (`Callable`, *optional*): waits for a number of seconds; by default [`stop`] ends the wait.

    Raises:
        UserError: if the address or the key is invalid (the message never shows the key).
        MissingPackageError: if openai is not installed.
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
            raise UserError(f"{key_name} contains characters that are invalid in an HTTP header. Set it to the key.")
        base_url = check_base_url(base_url)
        check_installed()
        from openai import DefaultHttpxClient, OpenAI, omit  # takes a second to import

        self.url = f"{base_url}/chat/completions"
        self._api_key = api_key
        self._key_name = key_name
        self._timeout = timeout
        self._max_retries = max_retries
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._headers = None if api_key else {"Authorization": omit}
        # We retry ourselves: `stop` cannot interrupt the waits of the openai client, which also backs off for 8 s at
        # most and accepts broken replies
        self._client = OpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            timeout=timeout,
            max_retries=0,
            http_client=DefaultHttpxClient(follow_redirects=False),  # never send answers to another host
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """Prevent new requests and retries; requests in flight still complete. Thread-safe."""
        self._stopped.set()

    def complete(self, body: dict[str, Any]) -> ChatReply:
        """Request a completion; retry after 408, 429, 5xx, a time-out, a lost connection or a broken reply.

        Args:
            body (`dict`): request body: `model`, `messages` and parameters.

        Raises:
            RequestRefused: if the endpoint refuses the content of the request.
            ChatError: if it rejects every request, the request failed more than `max_retries` times, or [`stop`] was
                called.
        """
        retries = 0
        while not self._stopped.is_set():
            try:
                return self._try(body, retries)
            except _Transient as failure:
                self._wait(retries, failure)
            retries += 1
        raise ChatError(f"{self.url}: no request was sent, because the client was stopped.")

    def _wait(self, retries: int, failure: _Transient) -> None:
        if retries == self._max_retries:
            raise ChatError(
                f"{self.url} failed {retries + 1} times, last with {failure}. Check that the server runs and that "
                "--base_url is right, or lower --concurrency."
            ) from failure
        if failure.wait is not None and failure.wait > MAX_REQUESTED_WAIT:
            raise ChatError(
                f"{self.url} asks to wait for {failure.wait:.0f} s ({failure}). Try again later."
            ) from failure
        self._sleep(seconds_before_retry(retries, failure.wait))

    def _try(self, body: dict[str, Any], retries: int) -> ChatReply:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=body, extra_headers=self._headers
            )
        except APITimeoutError as error:
            raise _Transient(f"no answer within {self._timeout:g} s") from error
        except APIConnectionError as error:
            raise _Transient(f"{type(error.__cause__).__name__} ({error.__cause__})") from error
        except APIStatusError as error:
            raise self._failure(error, body) from None  # the openai error contains the key
        try:
            reply = response.parse()
            text = reply.choices[0].message.content
            if not isinstance(text, str | None):
                raise TypeError(f"content is a {type(text).__name__}")
            prompt_tokens = int(getattr(reply.usage, "prompt_tokens", None) or 0)
            completion_tokens = int(getattr(reply.usage, "completion_tokens", None) or 0)
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise _Transient(f"the reply is not a chat completion: HTTP 200{self._quoted(response.text)}") from error
        return ChatReply(self._without_key(text or ""), reply.model, prompt_tokens, completion_tokens, retries)

    def _failure(self, error: "APIStatusError", body: dict[str, Any]) -> Exception:
        """Return the error for a status other than 200, with the server's message and without the key."""
        status, message = error.status_code, error.body
        if isinstance(message, dict):
            message = message.get("message") or error.response.text
        reply = f"HTTP {status}{self._quoted(str(message))}"
        if status in _TRANSIENT or status >= 500:
            return _Transient(reply, _retry_after(error.response.headers.get("Retry-After")))
        if status in _REFUSED:
            return RequestRefused(f"{self.url} refuses a request: {reply}.")
        if status in (401, 403):
            fix = f"Check the key in {self._key_name}" if self._api_key else f"No key was sent: set {self._key_name}"
            return ChatError(f"{self.url} rejected the API key: {reply}. {fix}.")
        if status == 404:
            return ChatError(
                f"{self.url} does not exist, or has no model {body['model']!r}: {reply}. Check --base_url, which "
                "often ends with /v1, and --judge_model."
            )
        return ChatError(f"{self.url} is not an OpenAI-compatible endpoint: {reply}.")

    def _quoted(self, text: str) -> str:
        # Redact before cutting: a cut key would no longer match
        text = " ".join(self._without_key(text).split()).rstrip(".")
        return f", {text[:_MAX_SHOWN]!r}" if text else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "(key)") if self._api_key else text


def check_installed() -> None:
    """Check that the `openai` client is installed.

    Raises:
        MissingPackageError: if it is not; the message has the install command.
    """
    if importlib.util.find_spec("openai") is None:
        raise MissingPackageError("The judge needs openai, which is not installed: pip install 'minillm-trl[judge]'")


def check_base_url(base_url: str) -> str:
    """Return the address without a trailing slash.

    Raises:
        UserError: if it is not an http(s) URL, or may contain a secret, which the message does not show.
    """
    advice = "Put the key into an environment variable and name it with --api_key_env."
    base_url = check_address(base_url, "--base_url", "http://localhost:8000/v1", advice)
    if base_url.endswith("/chat/completions"):
        raise UserError(f"--base_url {base_url}: remove /chat/completions, which is added automatically.")
    return base_url


def seconds_before_retry(retries: int, asked: float | None) -> float:
    """Return the wait before a retry: what the server asks for, else 1, 2, 4, ... up to 60 seconds, with jitter.

    Args:
        retries (`int`): retries so far.
        asked (`float`, *optional*): seconds that the server asks for. Jitter adds up to a second. Without a request,
            the wait is a random 50 % to 100 % of the power of two.
    """
    if asked is not None:
        return asked + random.random()
    return min(MAX_BACKOFF, 2.0**retries) * random.uniform(0.5, 1.0)


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header (a number or a date); None if it is missing or invalid."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return None
