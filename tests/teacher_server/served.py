"""Teacher servers in threads: our own application, and a stand-in for vLLM."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from aiohttp import web
from conftest import build_tokenizer
from transformers import PreTrainedModel

from minillm_trl.teacher_server.server import make_app
from minillm_trl.teacher_server.service import TeacherService


@contextmanager
def serving(app: web.Application) -> Iterator[str]:
    """Serve an application at a free port, and yield its address."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def own_app(teacher: PreTrainedModel, api_key: str | None = None, batch_size: int = 4) -> web.Application:
    """Return the application of `serve-teacher` around a model."""
    return make_app(TeacherService(teacher, build_tokenizer(), "the-teacher", batch_size), api_key)


def vllm_app(
    teacher: PreTrainedModel, max_logprobs: int = 20, tokenize: Callable[[str], list[int]] | None = None
) -> web.Application:
    """Return a stand-in for vLLM's server, with the answers of its `/v1/models`, `/tokenize` and `/v1/completions`.

    They are those of vLLM 0.32, also in that a request for more log-probs than there are tokens stops the engine.
    """
    context, running = 128, [True]

    def refusal(text: str, status: int = 400) -> web.Response:
        return web.json_response({"error": {"message": text, "code": status}}, status=status)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "the-teacher", "max_model_len": context}]})

    async def encode(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": tokenize(body["prompt"]), "max_model_len": context})

    async def completions(request: web.Request) -> web.Response:
        body = await request.json()
        assert body["max_tokens"] == 1, body
        k = body["prompt_logprobs"]
        if k > max_logprobs:
            return refusal(f"Requested prompt logprobs of {k}, which is greater than max allowed: {max_logprobs}")
        if any(len(ids) >= context for ids in body["prompt"]):
            return refusal("max_tokens must be at least 1, got 0.")
        if k > teacher.config.vocab_size:
            running.clear()
        if not running:
            return refusal("EngineCore encountered an issue.", 500)
        choices = [
            {"index": index, "text": "x", "prompt_logprobs": prompt_logprobs(teacher, ids, k)}
            for index, ids in enumerate(body["prompt"])
        ]
        return web.json_response({"id": "cmpl-0", "choices": choices[::-1]})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", completions)])
    if tokenize is not None:
        app.add_routes([web.post("/tokenize", encode)])
    return app


@torch.no_grad()
def prompt_logprobs(teacher: PreTrainedModel, ids: list[int], k: int) -> list[dict | None]:
    """Return what vLLM returns for a prompt: nothing for its first token, then the actual one and the k largest."""
    log_probs = torch.log_softmax(teacher(torch.tensor([ids])).logits[0].float(), dim=-1)
    positions: list[dict | None] = [None]
    for place, token in enumerate(ids[1:]):
        ranks = log_probs[place].argsort(descending=True).argsort() + 1
        listed = dict.fromkeys([token, *log_probs[place].topk(k).indices.tolist()])
        positions.append(
            {
                str(name): {
                    "logprob": max(float(log_probs[place, name]), -9999.0),
                    "rank": int(ranks[name]),
                    "decoded_token": "x",
                }
                for name in listed
            }
        )
    return positions
