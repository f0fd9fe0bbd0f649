"""`minillm-trl serve-teacher` as a process: killed and started again in the middle of a run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ENVIRONMENT
from safetensors.torch import load_file

from minillm_trl.cli import main


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the mill {number}"}) + "\n" for number in range(32)))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "minillm_trl", *map(str, words)]
    return subprocess.Popen(
        command,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def server(model: str, port: int) -> Iterator[subprocess.Popen]:
    """Start the server, and wait until it answers."""
    process = start("serve-teacher", "--model", model, "--port", port)
    try:
        for _ in range(1200):
            assert process.poll() is None, process.stdout.read()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/info", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def options(tmp_path: Path, model_dir, port: int, name: str) -> list[object]:
    return [
        "minillm",
        *("--model_name_or_path", model_dir("gpt2", 0), "--teacher_server_url", f"http://127.0.0.1:{port}"),
        *("--teacher_mixed_alpha", 0.0, "--teacher_server_retries", 1, "--dataset_name", prompts(tmp_path)),
        *("--output_dir", tmp_path / name, "--max_steps", 40, "--max_completion_length", 8),
        *("--per_device_train_batch_size", 4, "--num_iterations", 1, "--logging_steps", 1, "--save_strategy", "no"),
        *("--use_cpu", "true", "--report_to", "none", "--learning_rate", 1e-2),
    ]


@pytest.mark.cli
def test_a_killed_server_costs_no_step(tmp_path, model_dir):
    teacher, port = model_dir("gpt2", 1, 48), free_port()
    with server(teacher, port) as process:
        undisturbed = start(*options(tmp_path, model_dir, port, "undisturbed"))
        said = undisturbed.communicate(timeout=600)[0]
        assert undisturbed.returncode == 0, said
        words = options(tmp_path, model_dir, port, "stopped")
        run = start(*words)
        for line in run.stdout:  # after a few steps
            if line.count("'loss'") and "'epoch'" in line:
                os.kill(process.pid, signal.SIGKILL)
                break
        said = run.stdout.read()
        assert run.wait(timeout=600) == 2, said
    assert "No teacher server answers" in said
    assert "resume_from_checkpoint=True continues from" in said
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 40
    with server(teacher, port):
        resumed = start(*words, "--resume_from_checkpoint", "true")
        said = resumed.communicate(timeout=600)[0]
        assert resumed.returncode == 0, said
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "stopped"))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.cli
def test_sigterm_ends_the_server(model_dir):
    with server(model_dir("gpt2", 1, 48), free_port()) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert "Serving" in process.stdout.read()


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "secret", False)]
)
def test_an_open_server_without_a_key_prints_a_warning(host, key, warned, model_dir, monkeypatch, capsys):
    monkeypatch.setattr("aiohttp.web.run_app", lambda *unused, **unused_too: None)
    monkeypatch.delenv("TEACHER_SERVER_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("TEACHER_SERVER_API_KEY", key)
    assert main(["serve-teacher", "--model", model_dir("gpt2"), "--host", host]) == 0
    assert ("set TEACHER_SERVER_API_KEY" in capsys.readouterr().err) == warned


class TestOptions:
    def test_no_teacher_and_two_teachers(self, tmp_path, model_dir, capsys):
        words = [
            "minillm",
            "--model_name_or_path",
            model_dir(),
            "--dataset_name",
            str(prompts(tmp_path)),
            "--use_cpu",
            "true",
        ]
        words += ["--output_dir", str(tmp_path), "--report_to", "none"]
        assert main(words) == 2
        assert "--teacher_model_name_or_path is missing" in capsys.readouterr().err
        both = ["--teacher", model_dir(), "--teacher_server_url", "http://a:1", "--teacher_mixed_alpha", "0.0"]
        assert main([*words, *both]) == 2
        assert "both given" in capsys.readouterr().err

    @pytest.mark.parametrize(("name", "value"), [("--batch_size", "0"), ("--port", "70000")])
    def test_values_of_the_server(self, name, value, capsys):
        assert main(["serve-teacher", "--model", "x", name, value]) == 2
        assert name in capsys.readouterr().err
