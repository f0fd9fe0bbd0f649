"""`benchmark`: the numbers of lm-eval with intervals, task by task."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from benchmark_tasks import (
    CHOICES,
    DEFINITIONS,
    GOLD,
    MEASURES,
    PAGE,
    QUESTIONS,
    OwnTasks,
    evaluated_tasks,
    log_likelihood,
    needs_lm_eval,
    no_loading,
    read,
    read_samples,
    sum_log_probs,
    write_answers,
    write_choices,
    write_task,
)
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model

from minillm_trl.cli import main
from minillm_trl.evaluation.general_benchmarks import SUITES
from minillm_trl.evaluation.lm_eval_results import wrap_model
from minillm_trl.evaluation.results import read_evaluation
from minillm_trl.evaluation.statistics import bootstrap_interval
from minillm_trl.rollouts.prompts import generate_completions


@needs_lm_eval
class TestBenchmark(OwnTasks):
    def test_accuracy_of_given_choices_is_that_of_plain_forward_passes(self, tmp_path, tasks, model_dir, capsys):
        write_choices(tasks)
        assert main(self.arguments(tmp_path, model_dir("llama"), "choices")) == 0
        tokenizer = build_tokenizer()
        model = build_model("llama", len(tokenizer))
        likelihoods = [
            [log_likelihood(model, tokenizer, question, choice) for choice in CHOICES] for question in QUESTIONS
        ]
        best = [max(range(3), key=row.__getitem__) for row in likelihoods]
        best_by_length = [max(range(3), key=lambda i, row=row: row[i] / len(CHOICES[i])) for row in likelihoods]
        accuracy = [float(a == b) for a, b in zip(best, GOLD, strict=True)]
        normalised = [float(a == b) for a, b in zip(best_by_length, GOLD, strict=True)]
        assert 0 < sum(accuracy) < 5

        results = read(tmp_path / "out" / "choices")
        assert results["per_prompt"] == [{"acc": a, "acc_norm": b} for a, b in zip(accuracy, normalised, strict=True)]
        assert results["summary"]["acc"] == bootstrap_interval(accuracy)._asdict()
        assert results["settings"]["main_measure"] == "acc"
        assert results["settings"]["higher_is_better"]["acc"] is True
        assert results["settings"]["prompts"] == 5
        assert results["truncated_prompts"] == 0
        assert set(results["versions"]) == {"minillm-trl", "torch", "transformers", "lm-eval", "task"}
        samples = read_samples(tmp_path / "out" / "choices")
        assert samples[0] == {
            "prompt": QUESTIONS[0],
            "references": [CHOICES[GOLD[0]]],
            "outputs": [CHOICES[best[0]]],
            "scores": {"acc": [accuracy[0]], "acc_norm": [normalised[0]]},
        }
        assert f"5 documents; written to {tmp_path / 'out' / 'choices'}" in capsys.readouterr().out

    def test_exact_match_of_answers_is_that_of_greedy_decoding(self, tmp_path, tasks, model_dir):
        tokenizer = build_tokenizer()
        model = build_model("llama", len(tokenizer))
        greedy = generate_completions(model, tokenizer, QUESTIONS, max_new_tokens=6, greedy=True)
        own = [completion.text.partition("\n")[0] for completion in greedy]
        write_answers(tasks, [*own[:2], "the mill", "the pub", "a river"])
        assert main(self.arguments(tmp_path, model_dir("llama"), "answers")) == 0
        results, samples = read(tmp_path / "out" / "answers"), read_samples(tmp_path / "out" / "answers")
        assert [row["exact_match"] for row in results["per_prompt"]] == [1.0, 1.0, 0.0, 0.0, 0.0]
        assert results["summary"]["exact_match"]["mean"] == pytest.approx(0.4)
        assert [sample["outputs"] for sample in samples] == [[text] for text in own]
        assert samples[2]["references"] == ["the mill"]
        settings = results["settings"]
        assert (settings["greedy"], settings["temperature"], settings["max_new_tokens"]) == (True, None, 6)

    def test_result_does_not_depend_on_the_batch_size(self, tmp_path, tasks, model_dir):
        write_choices(tasks)
        for size in ("1", "auto"):
            run = self.arguments(tmp_path, model_dir("llama"), "choices")
            assert main([*run, "--output_dir", str(tmp_path / size), "--batch_size", size]) == 0
        assert read(tmp_path / "1" / "choices") == read(tmp_path / "auto" / "choices")

    def test_documents_of_a_group_count_alike_as_with_lm_eval(self, tmp_path, tasks, model_dir, capsys, monkeypatch):
        import lm_eval
        from lm_eval.tasks import TaskManager

        write_choices(tasks, "one", slice(0, 3))
        write_choices(tasks, "two", slice(3, 5))
        metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
        group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}
        (tasks / "both.yaml").write_text(yaml.safe_dump({**group, "metadata": {"version": 1.0}}))
        run = self.arguments(tmp_path, model_dir("llama"), "both")
        with evaluated_tasks(stop_at="two") as evaluated:
            assert main(run) == 130
        assert not (tmp_path / "out" / "both" / "results.json").exists()
        with evaluated_tasks() as evaluated:
            assert main(run) == 0
        assert evaluated == ["two"]

        results = read(tmp_path / "out" / "both")
        lm = wrap_model(build_model("llama", len(build_tokenizer())), build_tokenizer(), 2)
        expected = lm_eval.simple_evaluate(model=lm, tasks=["both"], task_manager=TaskManager(include_path=str(tasks)))
        assert results["summary"]["acc"]["mean"] == pytest.approx(expected["groups"]["both"]["acc,none"])
        assert results["summary"]["acc"]["n"] == 5
        assert results["settings"]["parts"] == ["one", "two"]
        assert results["settings"]["prompts"] == 5
        assert results["versions"]["task"] == {"one": 1.0, "two": 1.0}
        assert [sample["prompt"] for sample in read_samples(tmp_path / "out" / "both")] == QUESTIONS
        assert list(read_evaluation("m", tmp_path / "out").tasks) == ["both"]  # and not its tasks
        (tmp_path / "out" / "both" / "results.json").unlink()
        monkeypatch.setattr(
            "minillm_trl.models.loading.load_model", no_loading
        )  # all that a model is needed for is there
        assert main(run) == 0
        assert read(tmp_path / "out" / "both") == results
        capsys.readouterr()
        assert main(run) == 0
        assert f"{tmp_path / 'out' / 'both'}: done before" in capsys.readouterr().out

    def test_tags_and_groups_without_metrics_stand_for_their_tasks(self, tmp_path, tasks, model_dir):
        for name in ("one", "two"):
            write_choices(tasks, name, tag="several")
        (tasks / "all.yaml").write_text("group: all\ntask: [one, two]\n")
        for name in ("several", "all"):
            run = self.arguments(tmp_path, model_dir("llama"), name)
            assert main([*run, "--output_dir", str(tmp_path / name), "--limit", "1"]) == 0
            assert sorted(path.parent.name for path in (tmp_path / name).glob("*/results.json")) == ["one", "two"]

    def test_each_filter_of_the_answers_is_a_measure(self, tmp_path, tasks, model_dir):
        filters = [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in (("whole", "(?s)(.*)"), ("never", "no such text"))
        ]
        tokenizer = build_tokenizer()
        greedy = generate_completions(
            build_model("llama", len(tokenizer)), tokenizer, QUESTIONS, max_new_tokens=6, greedy=True
        )
        write_answers(tasks, [completion.text.partition("\n")[0] for completion in greedy], filter_list=filters)
        assert main(self.arguments(tmp_path, model_dir("llama"), "answers")) == 0
        results = read(tmp_path / "out" / "answers")
        assert results["settings"]["main_measure"] == "exact_match,whole"
        assert {name: interval["mean"] for name, interval in results["summary"].items()} == {
            "exact_match,whole": 1.0,
            "exact_match,never": 0.0,
        }
        assert len(results["per_prompt"]) == 5

    def test_metric_that_is_no_mean_over_documents_keeps_the_interval_of_lm_eval(self, tmp_path, tasks, model_dir):
        rows = [
            {"text": question, "end": choice}
            for question, choice in zip(QUESTIONS, [*CHOICES, "pub", "food"], strict=True)
        ]
        metrics = [
            {"metric": name, "aggregation": how, "higher_is_better": how == "mean"}
            for name, how in (("perplexity", "perplexity"), ("acc", "mean"))
        ]
        settings = {"doc_to_text": "{{text}}", "doc_to_target": " {{end}}", "target_delimiter": ""}
        write_task(tasks, "ends", rows, output_type="loglikelihood", metric_list=metrics, **settings)
        assert main(self.arguments(tmp_path, model_dir("llama"), "ends")) == 0
        results, samples = read(tmp_path / "out" / "ends"), read_samples(tmp_path / "out" / "ends")
        tokenizer = build_tokenizer()
        model = build_model("llama", len(tokenizer))
        likelihoods = [log_likelihood(model, tokenizer, row["text"], row["end"]) for row in rows]
        perplexity = results["summary"]["perplexity"]
        assert perplexity["mean"] == pytest.approx(math.exp(-sum(likelihoods) / 5), rel=1e-4)
        assert perplexity["mean"] - perplexity["low"] == pytest.approx(1.96 * perplexity["standard_error"])
        assert perplexity["standard_error"] > 0
        assert results["intervals"] == {
            "perplexity": "1.96 standard errors of lm-eval",
            "acc": "bootstrap over documents",
        }
        assert results["per_prompt"][0].keys() == {"acc"}
        assert results["settings"]["higher_is_better"] == {"perplexity": False, "acc": True}
        assert samples[0]["scores"]["perplexity"][0] == pytest.approx(likelihoods[0], rel=1e-4)
        assert samples[0]["outputs"] == []

    def test_choices_that_are_parts_of_the_prompts_are_shown_as_such(self, tmp_path, tasks, model_dir):
        rows = [{"choices": CHOICES, "gold": gold, "end": "is cheap"} for gold in GOLD]
        settings = {"doc_to_text": "gold", "doc_to_target": "end", "doc_to_choice": "choices"}
        write_task(tasks, "inputs", rows, output_type="multiple_choice", metric_list=MEASURES, **settings)
        assert main(self.arguments(tmp_path, model_dir("llama"), "inputs")) == 0
        tokenizer = build_tokenizer()
        model = build_model("llama", len(tokenizer))
        likelihoods = [log_likelihood(model, tokenizer, choice, "is cheap") for choice in CHOICES]
        best = likelihoods.index(max(likelihoods))
        for sample, gold in zip(read_samples(tmp_path / "out" / "inputs"), GOLD, strict=True):
            assert sample["references"] == [CHOICES[gold]]
            assert sample["outputs"] == [CHOICES[best]]
            assert sample["scores"]["acc"] == [float(best == gold)]

    def test_prompts_longer_than_the_context_are_counted(self, tmp_path, tasks, model_dir, capsys):
        long = "{{question * (60 if gold == 1 else 1)}}"  # two of the five; a context has 128 tokens
        write_choices(tasks, doc_to_text=long)
        write_answers(tasks, ["a"] * 5, doc_to_text="{{question * (60 if 'river' in question else 1)}}")
        assert main(self.arguments(tmp_path, model_dir("llama"), "choices", "answers")) == 0
        assert [read(tmp_path / "out" / name)["truncated_prompts"] for name in ("choices", "answers")] == [2, 2]
        assert "2 of 5 prompts were longer than the model's context" in capsys.readouterr().out

    def test_adapter_is_merged_and_chat_template_is_applied(self, tmp_path, tasks, model_dir, capsys):
        write_choices(tasks)
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        shutil.copytree(model_dir("llama"), base)
        tuned = get_peft_model(
            build_model("llama", len(build_tokenizer())),
            LoraConfig(target_modules="all-linear", init_lora_weights=False),
        )
        tuned.peft_config["default"].base_model_name_or_path = str(base)
        tuned.save_pretrained(adapter)
        run = self.arguments(tmp_path, str(base), "choices")
        assert main([*run, "--adapter", str(adapter), "--apply_chat_template"]) == 2
        assert f"--apply_chat_template: the tokenizer of {base} has no chat template" in capsys.readouterr().err
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
        tokenizer.save_pretrained(base)
        assert main([*run, "--adapter", str(adapter), "--apply_chat_template"]) == 0
        samples = read_samples(tmp_path / "out" / "choices")
        assert samples[0]["prompt"] == f"<{QUESTIONS[0]}>"
        merged = tuned.merge_and_unload().eval()
        for sample, question in zip(samples, QUESTIONS, strict=True):
            ids = [tokenizer(f"<{question}>{choice}")["input_ids"] for choice in CHOICES]
            start = len(tokenizer(f"<{question}>")["input_ids"])
            likelihoods = [sum_log_probs(merged, choice_ids, start) for choice_ids in ids]
            assert sample["outputs"] == [CHOICES[likelihoods.index(max(likelihoods))]]

    def test_metric_without_a_standard_error_is_kept_without_an_interval(self, tmp_path, tasks, model_dir, capsys):
        write_answers(tasks, ["a"] * 5)
        own = "\nprocess_results: !function rules.score\nmetric_list:\n"
        own += "  - {metric: all_rules, aggregation: mean, higher_is_better: true}\n"
        own += "  - {metric: rules, aggregation: !function rules.share, higher_is_better: true}\n"
        with (tasks / "answers.yaml").open("a") as file:  # of keys that stand twice YAML takes the last
            file.write(own)
        (tasks / "rules.py").write_text(
            "def score(document, results):\n"
            "    followed = [True] * 3 if 'mill' in document['question'] else [True, False]\n"
            "    return {'all_rules': all(followed), 'rules': followed}\n\n"
            "def share(documents):\n"
            "    return sum(map(sum, documents)) / sum(map(len, documents))\n"
        )
        assert main(self.arguments(tmp_path, model_dir("llama"), "answers")) == 0
        results, samples = read(tmp_path / "out" / "answers"), read_samples(tmp_path / "out" / "answers")
        assert results["summary"].keys() == {"all_rules"}
        assert results["summary"]["all_rules"]["mean"] == pytest.approx(1 / 5)
        assert results["corpus"] == {"rules": pytest.approx(7 / 11)}
        assert samples[1]["scores"] == {"all_rules": [False], "rules": [[True, False]]}
        assert "0.636, without an interval" in capsys.readouterr().out

    @pytest.mark.parametrize("name", DEFINITIONS)
    def test_definitions_of_lm_eval_run_on_documents_of_their_form(self, tmp_path, tasks, model_dir, name: str):
        import lm_eval

        path, num_fewshot, measure, row = DEFINITIONS[name]
        tasks.mkdir()
        (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(6)))
        files = dict.fromkeys(("train", "validation", "test"), str(tasks / "rows.jsonl"))
        definition = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        if name != "sciq":
            definition["generation_kwargs"] = {"until": ["Q"], "max_gen_toks": 2, "do_sample": False}
        (tasks / "task.yaml").write_text(yaml.safe_dump(definition))
        model = tmp_path / "model"
        shutil.copytree(model_dir("llama"), model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
        assert main([*self.arguments(tmp_path, str(model), name), "--limit", "2"]) == 0
        results = read(tmp_path / "out" / name)
        assert (results["settings"]["num_fewshot"], results["settings"]["main_measure"]) == (num_fewshot, measure)
        assert results["summary"][measure]["n"] == 2
        assert results["truncated_prompts"] == 0
        assert f"| `{name}` | {num_fewshot} | `{measure}` |" in PAGE.read_text()

    def test_suites_name_tasks_of_lm_eval(self):
        import lm_eval
        from lm_eval.tasks import TaskManager

        folders = ("gsm8k", "minerva_math", "benchmarks", "bbh", "ifeval", "mbpp", "sciq")
        paths = [str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder in folders]
        index = TaskManager(include_path=paths).task_index
        for name in SUITES["general"]:
            assert name in index
            assert f"| `{name}` |" in PAGE.read_text()
        for name, num_fewshot in (("ifeval", 0), ("mbpp", 3)):  # which need more than their documents
            assert index[name].cfg["num_fewshot"] == num_fewshot
            assert (
                f"| `{name}` | {num_fewshot} | `{index[name].cfg['metric_list'][0]['metric'].rpartition('.')[2]}` |"
                in PAGE.read_text()
            )
