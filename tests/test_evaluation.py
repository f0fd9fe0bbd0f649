"""Evaluating a model: the same numbers for any batch size, and a reverse KL that is the enumerated one."""

import math

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset

from minillm_trl.cli import main
from minillm_trl.evaluation.divergence import completion_reverse_kl
from minillm_trl.evaluation.evaluate import evaluate_model
from minillm_trl.evaluation.generation import encode_prompts, end_token_ids, generate_completions

TOKENIZER = build_tokenizer()
PROMPTS = [f"the mill {'is cheap ' * (i % 3)}{i}\n" for i in range(7)]
DATASET = Dataset.from_dict({"prompt": PROMPTS, "references": [["a cheap pub", "the river"]] * 7})


def evaluate(batch_size: int, **options):
    student, teacher = build_model("gpt2", len(TOKENIZER)), build_model("gpt2", len(TOKENIZER), seed=1)
    settings = {"seeds": [3, 4], "max_new_tokens": 8, "batch_size": batch_size, "teacher": teacher, "progress": False}
    return evaluate_model(student, TOKENIZER, DATASET, **{**settings, **options})


def test_results_do_not_depend_on_the_batch_size():
    one, many = evaluate(1), evaluate(5)
    assert one.samples == many.samples
    for a, b in zip(one.per_prompt, many.per_prompt, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_every_measure_is_there_with_its_interval():
    evaluation = evaluate(4)
    names = {"rouge_l", "reverse_kl", "length", "eos_rate", "repeated_4grams", "distinct_outputs"}
    assert evaluation.summary.keys() == names
    for name, interval in evaluation.summary.items():
        assert interval.low <= interval.mean <= interval.high
        assert interval.mean == pytest.approx(sum(row[name] for row in evaluation.per_prompt) / 7)
    assert len(evaluation.samples[0]["outputs"]) == 2


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="Nothing to evaluate: 7 prompts and 0 seeds"):
        evaluate(4, seeds=[])


def test_reverse_kl_of_a_completion_is_the_sum_over_its_tokens():
    student, teacher = build_model("gpt2", 40), build_model("gpt2", 40, seed=1)
    prompts, completions = [[5], [6, 7, 8]], [[9, 10, 0], [11]]
    actual = completion_reverse_kl(student, teacher, prompts, completions, vocab_size=40, temperature=1.5)
    for prompt, completion, value in zip(prompts, completions, actual, strict=True):
        with torch.no_grad():
            log_q, log_p = (
                torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0] / 1.5, -1)
                for model in (student, teacher)
            )
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)[len(prompt) - 1 : -1].sum()
        assert value == pytest.approx(kl.item(), rel=1e-4)


def test_mean_reverse_kl_of_samples_estimates_that_of_the_sequences():
    """One-token completions: the sequence KL is the KL of one distribution."""
    student, teacher = build_model("gpt2", 40), build_model("gpt2", 40, seed=1)
    value = completion_reverse_kl(student, teacher, [[5]], [[0]], vocab_size=40)[0]
    with torch.no_grad():
        q, p = (torch.softmax(model(torch.tensor([[5]])).logits[0, -1], -1) for model in (student, teacher))
    assert value == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(q.tolist(), p.tolist(), strict=True)), rel=1e-4
    )


class TestGeneration:
    def test_seed_and_index_determine_a_completion(self):
        model = build_model("gpt2", len(TOKENIZER))
        options = {"max_new_tokens": 6}
        first = generate_completions(model, TOKENIZER, PROMPTS, seed=1, **options)
        assert first == generate_completions(model, TOKENIZER, PROMPTS, seed=1, batch_size=2, **options)
        assert first[:3] == generate_completions(model, TOKENIZER, PROMPTS[:3], seed=1, **options)
        assert first != generate_completions(model, TOKENIZER, PROMPTS, seed=2, **options)

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


@pytest.mark.parametrize("metric", ["eval_rouge_l", "rouge_l"])
def test_rouge_l_cannot_choose_a_checkpoint_on_prompts_alone(tmp_path, model_dir, capsys, metric: str):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "the mill"}\n')
    models = ("--model_name_or_path", model_dir("llama"), "--teacher_model_name_or_path", str(tmp_path / "none"))
    arguments = ("--dataset", str(data), "--eval_dataset", str(data), "--eval_strategy", "steps", "--use_cpu", "true")
    options = ("--metric_for_best_model", metric, "--bf16", "false", "--output_dir", str(tmp_path / "out"))
    assert main(["minillm", *models, *arguments, *options]) == 2
    message = capsys.readouterr().err
    assert f"metric_for_best_model={metric} needs references or completions, and {data} has prompts alone" in message
