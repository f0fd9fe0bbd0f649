"""Evaluating a model: the same numbers for any batch size."""

import json
import math

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset

from minillm_trl.cli import main
from minillm_trl.evaluation.divergence import score_completions
from minillm_trl.evaluation.evaluate import evaluate_model
from minillm_trl.evaluation.exposure_bias import excess_accumulated_error, sample_divergences
from minillm_trl.models.files import is_lost_folder
from minillm_trl.rollouts.prompts import encode_prompts, end_token_ids, generate_completions

TOKENIZER = build_tokenizer()
PROMPTS = [f"the mill {'is cheap ' * (i % 3)}{i}\n" for i in range(7)]
DATASET = Dataset.from_dict({"prompt": PROMPTS, "references": [["a cheap pub", "the river"]] * 7})


def evaluate(batch_size: int, **options):
    student, teacher = build_model("gpt2", len(TOKENIZER)), build_model("gpt2", len(TOKENIZER), seed=1)
    settings = {"seeds": [3, 4], "max_new_tokens": 8, "batch_size": batch_size, "teacher": teacher, "progress": False}
    return evaluate_model(student, TOKENIZER, DATASET, **{**settings, **options})


def test_results_do_not_depend_on_the_batch_size():
    one, many = evaluate(1), evaluate(5)
    assert [sample["outputs"] for sample in one.samples] == [sample["outputs"] for sample in many.samples]
    for a, b in zip(one.per_prompt, many.per_prompt, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_every_measure_is_there_with_its_interval():
    evaluation = evaluate(4)
    text = {"rouge_l", "exact_match", "loss", "length", "eos_rate", "repeated_4grams"}
    several_seeds = {"best_rouge_l", "distinct_outputs", "distinct_4grams", "self_bleu"}
    names = {*text, *several_seeds, "entropy_per_token", "reverse_kl", "reverse_kl_per_token"}
    assert evaluation.summary.keys() == names
    for name, interval in evaluation.summary.items():
        assert interval.low <= interval.mean <= interval.high
        assert interval.mean == pytest.approx(sum(row[name] for row in evaluation.per_prompt) / 7)
    assert len(evaluation.samples[0]["outputs"]) == 2


def test_loss_is_that_of_transformers_on_all_references_with_their_ends():
    model = build_model("gpt2", len(TOKENIZER))
    row = evaluate(4).per_prompt[2]
    prompt, total, tokens = TOKENIZER(PROMPTS[2])["input_ids"], 0.0, 0
    for reference in DATASET[2]["references"]:
        ids = [*TOKENIZER(reference)["input_ids"], TOKENIZER.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids])
        total += model(torch.tensor([prompt + ids]), labels=labels).loss.item() * len(ids)
        tokens += len(ids)
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_references_beyond_the_context_are_cut():
    dataset = Dataset.from_dict({"prompt": PROMPTS[:1], "references": [["the mill " * 200]]})
    model = build_model("gpt2", len(TOKENIZER))
    evaluation = evaluate_model(model, TOKENIZER, dataset, seeds=[1], max_new_tokens=4, progress=False)
    assert math.isfinite(evaluation.per_prompt[0]["loss"])


def test_forward_kl_is_the_reverse_kl_of_the_teacher_to_the_student():
    student, teacher = build_model("gpt2", len(TOKENIZER)), build_model("gpt2", len(TOKENIZER), seed=1)
    options = {"seeds": [3, 4], "max_new_tokens": 8, "progress": False}
    forward = evaluate_model(student, TOKENIZER, DATASET, teacher=teacher, forward_kl=True, **options)
    swapped = evaluate_model(teacher, TOKENIZER, DATASET, teacher=student, **options)
    for one, two in zip(forward.per_prompt, swapped.per_prompt, strict=True):
        assert one["forward_kl"] == pytest.approx(two["reverse_kl"], rel=1e-4)
        assert one["reverse_kl"] != pytest.approx(two["reverse_kl"], rel=1e-3)


class TestTeacherTemperature:
    def evaluate(self, **options):
        student, teacher = build_model("gpt2", len(TOKENIZER)), build_model("gpt2", len(TOKENIZER), seed=1)
        options = {"seeds": [3], "max_new_tokens": 8, "temperature": 0.5, "progress": False, **options}
        return student, teacher, evaluate_model(student, TOKENIZER, DATASET, teacher=teacher, **options)

    @pytest.mark.parametrize("teacher_temperature", [None, 1.0])
    def test_reverse_kl_is_from_the_teacher_at_its_temperature(self, teacher_temperature):
        student, teacher, found = self.evaluate(teacher_temperature=teacher_temperature)
        completions = generate_completions(student, TOKENIZER, PROMPTS, seed=3, max_new_tokens=8, temperature=0.5)
        scores = score_completions(
            student,
            teacher,
            encode_prompts(TOKENIZER, PROMPTS),
            [completion.token_ids for completion in completions],
            vocab_size=len(TOKENIZER),
            temperature=0.5,
            second_temperature=teacher_temperature or 0.5,
        )
        for row, entropy, divergence in zip(found.per_prompt, *scores, strict=True):
            assert row["entropy_per_token"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-4)
            assert row["reverse_kl"] == pytest.approx(sum(divergence), rel=1e-4)

    def test_forward_kl_is_on_samples_of_the_teacher_at_its_temperature(self):
        student, teacher, found = self.evaluate(teacher_temperature=1.0, forward_kl=True)
        options = {"seeds": [3], "max_new_tokens": 8, "progress": False}
        swapped = evaluate_model(
            teacher, TOKENIZER, DATASET, teacher=student, teacher_temperature=0.5, temperature=1.0, **options
        )
        for one, two in zip(found.per_prompt, swapped.per_prompt, strict=True):
            assert one["forward_kl"] == pytest.approx(two["reverse_kl"], rel=1e-4)


def test_best_of_the_seeds():
    evaluation = evaluate(4)
    for row, sample in zip(evaluation.per_prompt, evaluation.samples, strict=True):
        assert row["best_rouge_l"] == max(sample["scores"]["rouge_l"])


def test_greedy_decoding_has_no_entropy():
    assert "entropy_per_token" not in evaluate(4, seeds=None, teacher=None).summary


def test_exposure_bias_is_measured_on_samples_of_the_first_seed():
    student, teacher = build_model("gpt2", len(TOKENIZER)), build_model("gpt2", len(TOKENIZER), seed=1)
    options = {"samples": 2, "max_new_tokens": 8, "batch_size": 7}
    first, second = (
        excess_accumulated_error(*sample_divergences(student, teacher, TOKENIZER, PROMPTS, seed=seed, **options))
        for seed in (3, 4)
    )
    assert evaluate(7, exposure_bias_samples=2).exposure_bias == first
    assert evaluate(7, exposure_bias_samples=2, seeds=[4]).exposure_bias == second != first


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="Nothing to evaluate: 7 prompts and 0 seeds"):
        evaluate(4, seeds=[])


class TestGeneration:
    def test_seed_and_index_determine_a_completion(self):
        model = build_model("gpt2", len(TOKENIZER))
        options = {"max_new_tokens": 6}
        first = generate_completions(model, TOKENIZER, PROMPTS, seed=1, **options)
        assert first == generate_completions(model, TOKENIZER, PROMPTS, seed=1, batch_size=2, **options)
        assert first[:3] == generate_completions(model, TOKENIZER, PROMPTS[:3], seed=1, **options)
        assert first != generate_completions(model, TOKENIZER, PROMPTS, seed=2, **options)

    def test_no_prompts_have_no_completions(self):
        """As on one of more processes than prompts."""
        assert generate_completions(build_model("gpt2", len(TOKENIZER)), TOKENIZER, [], max_new_tokens=6) == []

    def test_seeds_share_no_sample_and_no_seed_repeats_none(self):
        model = build_model("gpt2", len(TOKENIZER))
        options = {"max_new_tokens": 12}
        found = [
            tuple(
                completion.text for completion in generate_completions(model, TOKENIZER, PROMPTS, **options, **choice)
            )
            for choice in ({}, {}, *({"seed": seed, "sample": sample} for seed in range(3) for sample in range(3)))
        ]
        assert len(set(found)) == 11
        torch.manual_seed(0)
        first = generate_completions(model, TOKENIZER, PROMPTS, **options)
        torch.manual_seed(0)
        assert generate_completions(model, TOKENIZER, PROMPTS, **options) == first

    def test_command_line_gives_neighbouring_seeds_other_samples(self, tmp_path, model_dir):
        found, output = [], tmp_path / "out.jsonl"
        for seed in ("0", "1"):
            options = ("--num_samples", "3", "--max_new_tokens", "12", "--seed", seed, "--output", str(output))
            assert main(["generate", "--model", model_dir("gpt2"), "--prompt", "the mill", *options]) == 0
            found += [json.loads(line)["completion"] for line in output.read_text().splitlines()]
        assert len(set(found)) == len(found) == 6

    def test_greedy_completions_do_not_depend_on_the_seed(self):
        model = build_model("gpt2", len(TOKENIZER))
        one, two = (
            generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=5, greedy=True, seed=seed)
            for seed in (1, 2)
        )
        assert one == two

    def test_conversation_without_chat_template_is_refused(self):
        with pytest.raises(ValueError, match="Prompt 1 is a conversation, but the tokenizer has no chat template"):
            encode_prompts(TOKENIZER, ["text", [{"role": "user", "content": "hi"}]])

    def test_empty_prompt_is_refused(self):
        with pytest.raises(ValueError, match=r"Prompt 0 .* has no tokens"):
            encode_prompts(TOKENIZER, [""])

    def test_ends_are_the_model_s_and_the_tokenizer_s(self):
        model = build_model("gpt2", len(TOKENIZER))
        model.generation_config.eos_token_id = [7, 9]
        assert end_token_ids(model, TOKENIZER) == [0, 7, 9]
        for odd in (2**70, True, "</s>"):
            model.generation_config.eos_token_id = odd
            with pytest.raises(ValueError, match=rf"eos_token_id {odd!r}, which is not a token id"):
                end_token_ids(model, TOKENIZER)


@pytest.mark.parametrize("metric", ["eval_rouge_l", "rouge_l"])
def test_rouge_l_cannot_choose_a_checkpoint_on_prompts_alone(tmp_path, model_dir, capsys, metric: str):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "the mill"}\n')
    models = ("--model_name_or_path", model_dir("llama"), "--teacher_model_name_or_path", str(tmp_path / "none"))
    arguments = ("--dataset", str(data), "--eval_dataset", str(data), "--eval_strategy", "steps", "--use_cpu", "true")
    options = ("--metric_for_best_model", metric, "--bf16", "false", "--output_dir", str(tmp_path / "out"))
    assert main(["minillm", *models, *arguments, *options]) == 2
    message = capsys.readouterr().err
    assert f"metric_for_best_model={metric}" in message
    assert str(data) in message


def test_fine_tuning_on_conversations_needs_a_chat_template(tmp_path, model_dir, capsys):
    turns = '[{"role": "user", "content": "the mill"}]', '[{"role": "assistant", "content": "is cheap"}]'
    data, model = tmp_path / "rows.jsonl", model_dir("gpt2")
    data.write_text(f'{{"prompt": {turns[0]}, "completion": {turns[1]}}}\n')
    options = ("--dataset", str(data), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path / "out"))
    assert main(["sft", "--model_name_or_path", model, *options]) == 2
    expected = f"--model_name_or_path {model}: the prompts are conversations, but its tokenizer has no chat template."
    assert expected in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    options += ("--chat_template_path", str(template), "--max_steps", "1", "--report_to", "none")
    assert main(["sft", "--model_name_or_path", model, *options]) == 0


def test_misspelt_folder_of_a_model_is_told_the_nearest(tmp_path, capsys):
    (tmp_path / "student").mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "the mill"}\n')
    options = ("--dataset", str(data), "--output_dir", str(tmp_path / "out"))
    assert main(["evaluate", "--model", str(tmp_path / "studnet"), *options]) == 2
    assert "(no such folder. Did you mean 'student'?)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./gone", "a/b/gone", "/gone", "runs/gone"])
def test_folder_of_a_model_that_is_not_there_is_said_to_be_none(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["generate", "--model", name, "--prompt", "a"]) == 2
    assert f"no tokenizer at {name!r} (no such folder)" in capsys.readouterr().err


def test_output_that_is_a_folder_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minillm_trl.models.loading.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    assert main(["generate", "--model", "gpt2", "--prompt", "a", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path}: this is a folder" in capsys.readouterr().err


def test_name_that_may_be_on_the_hub_is_looked_up_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a clone has a folder `runs` once the demo ran in it
    assert not any(map(is_lost_folder, ("gpt2", "owner/name")))
    assert all(map(is_lost_folder, ("./gpt2", "/owner/name", "runs/my/model", "runs/")))
