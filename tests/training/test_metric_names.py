"""A metric that chooses the checkpoint and that no evaluation has is refused before the training."""

import json
from pathlib import Path

import pytest

from minillm_trl.cli import main
from minillm_trl.training.metric_names import FINE_TUNING, KD, MINILLM


@pytest.mark.parametrize("command", ["sft", "kd", "seqkd", "minillm"])
def test_misspelt_metric_is_refused_before_anything_is_read(tmp_path, capsys, command: str):
    nothing = str(tmp_path / "none")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "the mill", "completion": "is cheap"}\n')
    options = ["--model_name_or_path", nothing, "--dataset", str(data), "--eval_dataset", str(data)]
    options += ["--eval_strategy", "steps", "--metric_for_best_model", "eval_rouge", "--output_dir", nothing]
    options += [] if command == "sft" else ["--teacher_model_name_or_path", nothing]
    assert main([command, *options, "--use_cpu", "true", "--bf16", "false"]) == 2
    message = capsys.readouterr().err
    assert (
        "metric_for_best_model='eval_rouge' is no metric of an evaluation here. Did you mean 'eval_rouge_l'?"
        in message
    )


def test_kl_to_the_student_as_it_was_needs_beta(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "the mill", "completion": "is cheap"}\n')
    options = ["--model_name_or_path", "none", "--teacher_model_name_or_path", "none", "--dataset", str(data)]
    options += ["--metric_for_best_model", "kl", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    options += ["--per_device_train_batch_size", "1"]
    assert main(["minillm", *options, "--bf16", "false"]) == 2
    assert "metric_for_best_model='kl' is no metric of an evaluation here" in capsys.readouterr().err
    assert main(["minillm", *options, "--bf16", "false", "--beta", "0.1"]) == 2
    assert "no tokenizer at 'none'" in capsys.readouterr().err


def test_names_of_metrics_are_those_of_the_page():
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    assert [name for name in sorted(MINILLM) if f"`{name}`" not in page] == []


def test_names_of_metrics_are_those_that_evaluations_log(tmp_path, model_dir):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "the mill {i}", "completion": "is cheap"}}\n' for i in range(4)))
    shared = ["--dataset", str(data), "--eval_dataset", str(data), "--eval_strategy", "steps", "--eval_steps", "1"]
    shared += ["--model_name_or_path", model_dir("gpt2"), "--max_steps", "1", "--use_cpu", "true", "--bf16", "false"]
    shared += ["--per_device_train_batch_size", "2", "--report_to", "none", "--max_completion_length", "4"]
    teacher = ["--teacher_model_name_or_path", model_dir("gpt2")]
    sampled = ["--predict_with_generate", "true"]
    minillm = ["--steps_per_generation", "1", "--beta", "0.1", *teacher]
    runs = {"sft": (sampled, FINE_TUNING), "kd": ([*sampled, *teacher], KD), "minillm": (minillm, MINILLM)}
    for command, (options, known) in runs.items():
        folder = tmp_path / command
        assert main([command, *shared, *options, "--output_dir", str(folder)]) == 0
        (state,) = folder.glob("checkpoint-*/trainer_state.json")
        logged = {name for entry in json.loads(state.read_text())["log_history"] for name in entry}
        evaluated = {name.removeprefix("eval_") for name in logged if name.startswith("eval_")}
        assert evaluated | {"aux_loss"} == known | {"aux_loss"}  # which mixtures of experts have alone
