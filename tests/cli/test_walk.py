"""A newcomer's walk with a pretrained chat model, as one would type it: from a file of questions to an answer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_models import TURN_END, question, save_chat_model
from conftest import ENVIRONMENT, run_module

pytestmark = [pytest.mark.slow, pytest.mark.cli]

PLACES = ("the river", "the mill", "the city centre", "a pub")
ROWS = [
    {"question": f"where is the {food} {kind}", "reply": f"near {place}"}
    for food, place in zip(("italian", "cheap", "friendly", "family"), PLACES, strict=True)
    for kind in ("pub", "mill", "food", "centre", "river", "city")
]
TRAINING = {
    **{"use_cpu": "true", "report_to": "none", "disable_tqdm": "true", "logging_steps": 1},
    **{"per_device_train_batch_size": 8, "dataset_eval_split": "validation"},
}


def words(subcommand: str, **options: object) -> list[str]:
    return [subcommand, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def run(subcommand: str, *more: str, **options: object) -> str:
    """What a command that works prints."""
    result = run_module("minillm_trl", *words(subcommand, **options), *more)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stdout


def attempts(folder: Path) -> list[dict]:
    return json.loads((folder / "run.json").read_text())["attempts"]


def interrupt(folder: Path, command: list[str]) -> subprocess.CompletedProcess:
    """Ctrl-C after the first checkpoint."""
    words = [sys.executable, "-m", "minillm_trl", *command]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # a shell's background job ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not any(folder.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    output, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, output, error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the walk begins: a pretrained teacher, a cut of it, and a file of questions with answers."""
    folder = tmp_path_factory.mktemp("walk")
    save_chat_model(folder / "pretrained", TURN_END, 2, width=64)
    save_chat_model(folder / "cut", TURN_END, 2, width=32)
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_from_a_file_of_questions_to_the_answer_of_a_merged_student(folder: Path):
    data = folder / "data"
    run(
        "prepare-data",
        **{"task": "examples", "source": folder / "qa.jsonl", "template": "chat", "output_dir": data},
        **{"prompt_column": "question", "completion_column": "reply", "tokenizer": folder / "pretrained"},
        **{"validation_rows": 4, "test_rows": 4},
    )
    rows = [json.loads(line) for line in (data / "train.jsonl").open()]
    assert len(rows) == len(ROWS) - 8
    assert rows[0]["prompt"][0]["role"] == "user"

    for start, name in (("pretrained", "teacher"), ("cut", "student")):
        options = {"learning_rate": 1e-2, "max_steps": 40, "save_strategy": "no", "eval_strategy": "epoch"}
        model = {"model_name_or_path": folder / start, "output_dir": folder / name}
        run("sft", dataset=data, **model, **options, **TRAINING)
        assert attempts(folder / name)[0]["status"] == "finished"

    distilled = folder / "distilled"
    command = words(
        "minillm",
        **{"dataset": data, "model_name_or_path": folder / "student", "output_dir": distilled},
        **{"teacher_model_name_or_path": folder / "teacher", "learning_rate": 1e-4, "max_steps": 24, "save_steps": 2},
        **{"use_peft": "true", "lora_target_modules": "all-linear", "max_completion_length": 12},
        **{"steps_per_generation": 1, "eval_strategy": "steps", "eval_steps": 8, **TRAINING},
    )
    stopped = interrupt(distilled, command)
    assert stopped.returncode == 130, stopped.stderr[-3000:]
    assert f"--resume_from_checkpoint true to continue from {distilled / 'checkpoint-'}" in stopped.stderr
    assert attempts(distilled)[0]["status"] == "stopped"
    assert not (distilled / "adapter_model.safetensors").exists()

    run(*command, "--resume_from_checkpoint", "true")
    first, second = attempts(distilled)
    assert 2 <= first["steps"] < second["steps"] == 24
    assert second["status"] == "finished"
    assert Path(second["resumed_from"]).parent == distilled
    history = json.loads((distilled / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == list(range(1, 25))
    assert [row["step"] for row in history if "eval_objective/reverse_kl" in row] == [8, 16, 24]

    evaluation = {"dataset": data, "split": "test", "max_new_tokens": 12, "teacher": folder / "teacher"}
    run("merge", adapter=distilled, output_dir=folder / "merged")
    kl = {}
    for model in ("distilled", "merged"):
        results = folder / f"results-{model}"
        run("evaluate", model=folder / model, output_dir=results, **evaluation)
        kl[model] = json.loads((results / "results.json").read_text())["summary"]["reverse_kl"]["mean"]
        samples = [json.loads(line) for line in (results / "samples.jsonl").open()]
        assert [row["prompt"][0]["role"] for row in samples] == ["user"] * 4
    assert kl["merged"] == pytest.approx(kl["distilled"], rel=0.02)
    run("compare", str(folder / "results-merged"), str(folder / "results-distilled"), output_dir=folder / "comparison")

    (line,) = run(
        "generate", "--chat", model=folder / "merged", prompt=ROWS[0]["question"], max_new_tokens=12
    ).splitlines()
    generated = json.loads(line)
    assert generated["prompt"] == question(ROWS[0]["question"])
    assert generated["completion"].strip()
