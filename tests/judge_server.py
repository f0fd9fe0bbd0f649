"""A scripted local chat endpoint that fails in every way, and inputs and outputs of a judge."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import conftest
import pytest
from evaluation_results import SETTINGS

from minillm_trl.data.templates import format_instruction
from minillm_trl.evaluation.verdicts import Verdict

KEY = "sk-secret-1234567890"
DROP, SLOW = "drop", "slow"  # what a scripted server does in place of an answer


class Server(ThreadingHTTPServer):
    """Follow `script` (statuses, texts of replies, DROP, SLOW), then answer with `reply(body)`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script: list = []
        self.reply: Callable[[dict], object] = by_quality
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            step = self.server.script.pop(0) if self.server.script else self.server.reply(body)
        if self.path != "/v1/chat/completions":
            step = (404, {}, "no such path")
        if step == DROP:
            return
        if step == SLOW:
            time.sleep(0.6)
            step = "1 1"
        if isinstance(step, int):
            step = (step, {}, json.dumps({"error": {"message": f"said to {self.headers['Authorization']}"}}))
        status, headers, text = step if isinstance(step, tuple) else (200, {}, completion(step))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def completion(text: str | None) -> str:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return json.dumps({"model": "judge-2030", "choices": [{"message": message}], "usage": usage})


def answers(body: dict) -> tuple[str, str]:
    """Return the two answers in the order in which the judge reads them."""
    text = body["messages"][-1]["content"]
    return tuple(re.search(rf"Start of Assistant {n}'s Answer\]\n(.*?)\n\n\[The End", text, re.S)[1] for n in (1, 2))


def by_quality(body: dict) -> str:
    """Score an answer by the number at its end; the first answer gets one more point."""
    first, second = (int(answer.split()[-1]) for answer in answers(body))
    return f"{first + 1} {second}\nAssistant 1 is first."


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(conftest.ENVIRONMENT, "NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def write_run(
    folder: Path, samples: dict[str, list[str]], reference: str | None = "gold 8", task: str = "dolly"
) -> Path:
    """Write a run of `evaluate`, with one answer to each instruction for each sampling seed."""
    folder.mkdir(parents=True)
    settings = {**SETTINGS, "dataset": f"data/{task}", "prompts": len(samples)}
    results = {"settings": settings, "summary": {}, "per_prompt": [{} for _ in samples]}
    results |= {"by_seed": {}, "corpus": {}, "buckets": [], "exposure_bias": None, "calibration": None}
    (folder / "results.json").write_text(json.dumps(results))
    references = [] if reference is None else [reference, "another 1"]
    rows = [
        {"prompt": format_instruction(question), "references": references, "outputs": outputs}
        for question, outputs in samples.items()
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verdict(key: str, scores: tuple[float, float] | None, **values) -> Verdict:
    fields = {"reply": "", "asked": 1, "retries": 0, "model": None, "prompt_tokens": 0, "completion_tokens": 0}
    return Verdict(key, scores, **{**fields, **values})
