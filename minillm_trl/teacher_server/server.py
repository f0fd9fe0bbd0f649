"""The HTTP routes of `minillm-trl serve-teacher`.

aiohttp serves them: one maintained package with server and client, in one process and without a second framework.
Requests are scored one after another in a thread, so that `GET /info` answers meanwhile.
"""

import asyncio
import hmac
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from .protocol import CONTENT_TYPE, SERVER, MessageError, decode_rows, encode_answer
from .service import TeacherService

MAX_REQUEST_BYTES = 2**30


def make_app(service: TeacherService, api_key: str | None = None) -> web.Application:
    """Return the application.

    Args:
        service ([`TeacherService`]): computes the answers.
        api_key (`str`, *optional*): key that each request must send as `Authorization: Bearer KEY`.
    """
    one_at_a_time = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")

    @web.middleware
    async def check_key(request: web.Request, handler):
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise web.HTTPUnauthorized(text="the key is missing or wrong")
        return await handler(request)

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"server": SERVER, **service.identity.to_json()})

    async def score(request: web.Request) -> web.Response:
        if (model := request.query.get("model")) != service.identity.fingerprint:
            raise web.HTTPConflict(
                text=f"this server has the model {service.identity.model!r} with the fingerprint "
                f"{service.identity.fingerprint}, the request is for {model}"
            )
        body = await request.read()
        try:
            options = {
                "temperature": _positive(request, "temperature", float),
                "vocab_size": _positive(request, "vocab_size", int),
            }
            rows = decode_rows(body)
            lists_tokens = any(row.listed is not None for row in rows)
            options["top_k"] = None if lists_tokens else _positive(request, "top_k", int)
            service.check(rows, options["vocab_size"])
        except MessageError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(
            one_at_a_time, lambda: encode_answer(service.score(rows, **options), with_ids=not lists_tokens)
        )
        return web.Response(body=answer, content_type=CONTENT_TYPE)

    async def stop(app: web.Application) -> None:
        one_at_a_time.shutdown(wait=False, cancel_futures=True)

    app = web.Application(middlewares=[check_key], client_max_size=MAX_REQUEST_BYTES)
    app.add_routes([web.get("/info", info), web.post("/score", score)])
    app.on_cleanup.append(stop)
    return app


def _positive(request: web.Request, name: str, kind: type) -> Any:
    try:
        value = kind(request.query[name])
    except (KeyError, ValueError) as error:
        raise MessageError(f"{name}={request.query.get(name)!r} is not a number") from error
    if not value > 0:
        raise MessageError(f"{name}={value} is not positive")
    return value
