"""Several servers with the same teacher share the rows of a rollout; failed requests are retried."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch

from .addresses import authorization
from .identity import Scoring, ServerIdentity, TeacherServerError
from .protocol import SERVER, Row
from .scoring_server import (
    MinillmServer,
    ScoringServer,
    TransientError,
    UnknownRouteError,
    request_json,
)
from .vllm_server import VllmServer

MAX_BACKOFF = 60.0  # seconds


def seconds_before_retry(retries: int) -> float:
    """Return the wait before a retry: 1, 2, 4, ... up to 60 seconds. There is no jitter: training uses no clock."""
    return min(MAX_BACKOFF, 2.0**retries)


@dataclass
class ServerPool:
    """Servers of one teacher.

    A request holds `batch_size` rows, so an answer does not depend on how many servers there are. A failed request
    goes back to the queue, where another server may take it, while its server pauses.

    Args:
        urls (`Sequence[str]`): their addresses.
        batch_size (`int`): rows of one request.
        timeout (`float`): seconds for one answer.
        max_retries (`int`): failures in a row after which a server is given up for this rollout.
        wait (`Callable[[int], float]`): seconds before a retry, from the number of retries before it.
    """

    urls: Sequence[str]
    batch_size: int = 16
    timeout: float = 600.0
    max_retries: int = 10
    wait: Callable[[int], float] = seconds_before_retry

    def __post_init__(self) -> None:
        self._servers: list[ScoringServer] = []

    def connect(self) -> ServerIdentity:
        """Find out what kind of server answers at each address, and return what they serve.

        Raises:
            TeacherServerError: if a server does not answer or is of an unknown kind, or they serve different models.
        """
        found = self._run(self._connect)
        (first, identity), *others = found
        for server, other in others:
            if other != identity:
                raise TeacherServerError(
                    f"teacher_server_url: {first.url} serves {identity.name}, but {server.url} serves {other.name}. "
                    "Serve the same model on all."
                )
        self._servers = [server for server, _ in found]
        return identity

    @property
    def has_vllm(self) -> bool:
        """Whether one of the servers is vLLM, which knows one temperature and lists its own tokens."""
        return any(isinstance(server, VllmServer) for server in self._servers)

    def encodings(self, model: str, text: str) -> list[tuple[str, list[int] | None]]:
        """Return the address of each vLLM server, and the ids that it gives a text; None if it does not say."""
        servers = [server for server in self._servers if isinstance(server, VllmServer)]

        async def ask(session: aiohttp.ClientSession) -> list[list[int] | None]:
            return [await self._retry(server.url, server.encode, session, model, text) for server in servers]

        return [(server.url, ids) for server, ids in zip(servers, self._run(ask), strict=True)]

    def score(self, rows: Sequence[Row], scoring: Scoring) -> list[torch.Tensor]:
        """Return the packed [`~minillm_trl.teacher_server.top_k.TopK`] of each row, `(t, 2K + 1)`.

        Raises:
            TeacherServerError: if a server refuses a request, or no server is left.
        """
        lengths = [len(row.prompt) + len(row.completion) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: -lengths[row])  # similar lengths together
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        answers = self._run(lambda session: self._score(session, rows, batches, scoring))
        found = dict(zip((row for batch in batches for row in batch), (x for a in answers for x in a), strict=True))
        return [found[row] for row in range(len(rows))]

    # Coroutines

    async def _connect(self, session: aiohttp.ClientSession) -> list[tuple[ScoringServer, ServerIdentity]]:
        return [await self._retry(url, _recognise, session, url) for url in self.urls]

    async def _retry(self, name: str, call: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        for retries in range(self.max_retries + 1):
            try:
                return await call(*arguments)
            except TransientError as failure:
                last = failure
            if retries < self.max_retries:
                await asyncio.sleep(self.wait(retries))
        raise TeacherServerError(_no_answer([f"{name}: {last}"], self.max_retries + 1)) from last

    async def _score(
        self, session: aiohttp.ClientSession, rows: Sequence[Row], batches: list[list[int]], scoring: Scoring
    ) -> list[list[torch.Tensor]]:
        answers: dict[int, list[torch.Tensor]] = {}
        waiting: asyncio.Queue[int] = asyncio.Queue()
        for number in range(len(batches)):
            waiting.put_nowait(number)
        failures: list[str] = []

        async def work(server: ScoringServer) -> None:
            retries = 0
            while True:
                number = await waiting.get()
                try:
                    answers[number] = await server.score(session, [rows[row] for row in batches[number]], scoring)
                except TransientError as failure:
                    waiting.put_nowait(number)
                    if retries == self.max_retries:
                        failures.append(f"{server.url}: {failure}")
                        return
                    await asyncio.sleep(self.wait(retries))
                    retries += 1
                    continue
                retries = 0
                if len(answers) == len(batches):
                    all_answered.set()

        all_answered = asyncio.Event()
        if not batches:
            return []
        workers: asyncio.Future[Any] = asyncio.gather(*map(work, self._servers))
        answered: asyncio.Future[Any] = asyncio.ensure_future(all_answered.wait())
        try:
            await asyncio.wait([workers, answered], return_when=asyncio.FIRST_COMPLETED)
            if workers.done():
                workers.result()  # raises what a worker raised
        finally:
            for task in (workers, answered):
                task.cancel()
            await asyncio.gather(workers, answered, return_exceptions=True)
        if len(answers) < len(batches):
            raise TeacherServerError(_no_answer(failures, self.max_retries + 1))
        return [answers[number] for number in range(len(batches))]

    def _run(self, call: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine in a thread, since notebooks have a running event loop. Ctrl-C cancels it."""

        async def with_session() -> Any:
            timeout = aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(self.timeout, 30.0))
            async with aiohttp.ClientSession(timeout=timeout, headers=authorization()) as session:
                return await call(session)

        results: list[Any] = []
        errors: list[BaseException] = []
        loop = asyncio.new_event_loop()
        task = loop.create_task(with_session())

        def run() -> None:
            try:
                results.append(loop.run_until_complete(task))
            except BaseException as error:  # raised again in the calling thread
                errors.append(error)
            finally:
                loop.close()

        thread = threading.Thread(target=run, name="teacher-servers", daemon=True)
        thread.start()
        try:
            thread.join()
        except BaseException:
            loop.call_soon_threadsafe(task.cancel)
            thread.join()
            raise
        if errors:
            raise errors[0]
        return results[0]


async def _recognise(session: aiohttp.ClientSession, url: str) -> tuple[ScoringServer, ServerIdentity]:
    """Return the server at `url`, by what it answers, and what it serves."""
    try:
        info = await request_json(session, "GET", f"{url}/info")
    except UnknownRouteError:
        info = None
    server: ScoringServer
    server = MinillmServer(url) if isinstance(info, dict) and info.get("server") == SERVER else VllmServer(url)
    return server, await server.identity(session)


def _no_answer(failures: Sequence[str], attempts: int) -> str:
    return (
        f"No teacher server answers. After {attempts} attempts in a row: {'; '.join(failures)}. Start the servers "
        "again, or check teacher_server_url."
    )
