"""`benchmark`: the numbers of lm-eval with intervals, task by task."""

import importlib.util
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model

from minillm_trl.cli import main
from minillm_trl.cli.arguments import parse_with_config
from minillm_trl.cli.benchmark import build_parser
from minillm_trl.cli.models import load_model
from minillm_trl.evaluation.general_benchmarks import SUITES
from minillm_trl.evaluation.generation import generate_completions
from minillm_trl.evaluation.lm_eval_results import evaluate_task, wrap_model
from minillm_trl.evaluation.metrics import bootstrap_interval
from minillm_trl.evaluation.results import read_evaluation

PAGE = Path(__file__).parents[1] / "docs" / "general_benchmarks.md"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)
QUESTIONS = ["the mill", "the pub in the city", "the river", "cheap food near the river", "the family"]
CHOICES = ["pub", "river", "mill cheap"]
GOLD = [0, 1, 2, 0, 1]
MEASURES = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]

# of lm-eval: file, number of examples, main measure, and a document
DEFINITIONS = {
    "gsm8k": ("gsm8k/gsm8k.yaml", 5, "exact_match,strict-match", {"question": "1 + 1?", "answer": "It is 2. #### 2"}),
    "minerva_math": (
        "minerva_math/minerva_math_algebra.yaml",
        4,
        "exact_match",
        {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$."},
    ),
    "hendrycks_math": (
        "hendrycks_math/hendrycks_math_algebra.yaml",
        0,
        "exact_match",
        {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$."},
    ),
    "bbh": ("bbh/cot_fewshot/navigate.yaml", 3, "exact_match,get-answer", {"input": "Turn left.", "target": "No"}),
    "sciq": (
        "sciq/sciq.yaml",
        0,
        "acc",
        {
            "support": "Water boils.",
            "question": "What boils?",
            "correct_answer": "water",
            **{f"distractor{i}": word for i, word in enumerate(("ice", "air", "stone"), 1)},
        },
    ),
}


def write_task(folder: Path, name: str, rows: list[dict], **definition) -> None:
    """The YAML of a task, and its documents."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"test_split": "test", "metadata": {"version": 1.0}, **definition}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_choices(folder: Path, name: str = "choices", rows: slice = slice(None), **definition) -> None:
    documents = [
        {"question": question, "choices": CHOICES, "gold": gold}
        for question, gold in zip(QUESTIONS[rows], GOLD[rows], strict=True)
    ]
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": MEASURES,
    }
    write_task(folder, name, documents, **{**settings, **definition})


def write_answers(folder: Path, answers: list[str], name: str = "answers", **definition) -> None:
    documents = [{"question": each, "answer": answer} for each, answer in zip(QUESTIONS, answers, strict=True)]
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, name, documents, **{**settings, **definition})


def sum_log_probs(model, ids: list[int], start: int) -> float:
    """Log-likelihood of the tokens from `start` on, from one forward pass without padding."""
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))


def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Of the answer after a space."""
    return sum_log_probs(model, tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"]))


@contextmanager
def evaluated_tasks(stop_at: str | None = None):
    """Names of the tasks that are evaluated meanwhile; at the task `stop_at` the user presses Ctrl-C."""
    names = []

    def evaluate(lm, task, **options):
        if task.task_name == stop_at:
            raise KeyboardInterrupt
        names.append(task.task_name)
        return evaluate_task(lm, task, **options)

    with mock.patch("minillm_trl.cli.benchmark.evaluate_task", evaluate):
        yield names


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().removesuffix("\n").split("\n")]


def no_loading(*_, **__):
    pytest.fail("loaded a model")


class TestWithoutLMEval:
    def test_missing_package_is_named_with_its_extra(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert main(["benchmark", "--model", "none", "--tasks", "gsm8k", "--output_dir", str(tmp_path)]) == 2
        message = "General benchmarks need lm-eval, which is not installed: pip install 'minillm-trl[eval]'"
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--limit", "0"], "--limit must be positive, got 0"),
            (["--num_fewshot", "-1"], "--num_fewshot must not be negative, got -1"),
            (["--batch_size", "many"], "--batch_size must be a positive number or auto, got 'many'"),
            (["--batch_size", "0"], "--batch_size must be a positive number or auto, got '0'"),
            (["--confirm"], "unknown option '--confirm'. Did you mean 'config'"),
        ],
    )
    def test_wrong_options_are_refused(self, tmp_path, capsys, options: list[str], message: str):
        run = ["benchmark", "--model", "none", "--tasks", "gsm8k", "--output_dir", str(tmp_path), *options]
        assert main(run) == 2
        assert message in capsys.readouterr().err

    def test_several_processes_are_refused(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["benchmark", "--model", "none", "--tasks", "gsm8k", "--output_dir", str(tmp_path)]) == 2
        assert "benchmark runs in one process" in capsys.readouterr().err

    def test_options_can_stand_in_a_yaml(self, tmp_path):
        path = tmp_path / "benchmark.yaml"
        path.write_text("tasks: [gsm8k, sciq]\nlimit: 10\nbatch_size: 4\napply_chat_template: true\n")
        values = parse_with_config(build_parser(), ["--config", str(path), "--model", "m", "--output_dir", "o"])[0]
        assert (values.tasks, values.limit, values.batch_size) == (["gsm8k", "sciq"], 10, "4")
        assert values.apply_chat_template
        assert not values.confirm_run_unsafe_code

    def test_commands_of_the_page_parse(self, tmp_path, monkeypatch):
        text = PAGE.read_text()
        (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
        (tmp_path / "benchmark.yaml").write_text(example)
        monkeypatch.chdir(tmp_path)
        commands = re.findall(r"^(?:HF_ALLOW_CODE_EVAL=1 )?minillm-trl benchmark (.+)$", text, flags=re.MULTILINE)
        assert len(commands) == 5
        for command in commands:
            assert parse_with_config(build_parser(), command.split())[0].tasks


class OwnTasks:
    @pytest.fixture(autouse=True)
    def only_own_tasks(self, tmp_path, monkeypatch):
        """Reading the YAMLs of lm-eval's 13,000 tasks takes long; the tests have a few of their own."""
        import datasets
        from lm_eval.tasks import TaskManager

        monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap forks otherwise

    @pytest.fixture
    def tasks(self, tmp_path: Path) -> Path:
        return tmp_path / "tasks"

    def arguments(self, tmp_path: Path, model: str, *names: str) -> list[str]:
        folders = ["--include_path", str(tmp_path / "tasks"), "--output_dir", str(tmp_path / "out")]
        return ["benchmark", "--model", model, *folders, "--tasks", *names]


@needs_lm_eval
class TestBenchmark(OwnTasks):
    def test_accuracy_of_given_choices_is_that_of_plain_forward_passes(self, tmp_path, tasks, model_dir, capsys):
        write_choices(tasks)
        assert main(self.arguments(tmp_path, model_dir("llama"), "choices")) == 0
        tokenizer = build_tokenizer()
        model = build_model("llama", len(tokenizer))
        likelihoods = [[log_likelihood(model, tokenizer, each, choice) for choice in CHOICES] for each in QUESTIONS]
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
        own = [each.text.partition("\n")[0] for each in greedy]
        write_answers(tasks, [*own[:2], "the mill", "the pub", "a river"])
        assert main(self.arguments(tmp_path, model_dir("llama"), "answers")) == 0
        results, samples = read(tmp_path / "out" / "answers"), read_samples(tmp_path / "out" / "answers")
        assert [row["exact_match"] for row in results["per_prompt"]] == [1.0, 1.0, 0.0, 0.0, 0.0]
        assert results["summary"]["exact_match"]["mean"] == pytest.approx(0.4)
        assert [sample["outputs"] for sample in samples] == [[each] for each in own]
        assert samples[2]["references"] == ["the mill"]
        settings = results["settings"]
        assert (settings["greedy"], settings["temperature"], settings["max_new_tokens"]) == (True, None, 6)

    def test_result_does_not_depend_on_the_batch_size(self, tmp_path, tasks, model_dir):
        write_choices(tasks)
        for size in ("1", "auto"):
            run = self.arguments(tmp_path, model_dir("llama"), "choices")
            assert main([*run, "--output_dir", str(tmp_path / size), "--batch_size", size]) == 0
        assert read(tmp_path / "1" / "choices") == read(tmp_path / "auto" / "choices")

    def test_second_run_goes_on_with_the_task_that_is_left(self, tmp_path, tasks, model_dir, capsys, monkeypatch):
        write_choices(tasks)
        write_answers(tasks, ["a"] * 5)
        run = self.arguments(tmp_path, model_dir("llama"), "choices", "answers")
        with evaluated_tasks(stop_at="answers") as evaluated:
            assert main(run) == 130
        assert evaluated == ["choices"]
        done = tmp_path / "out" / "choices"
        written = (done / "results.json").read_bytes()
        assert not (tmp_path / "out" / "answers").exists()
        with evaluated_tasks() as evaluated:
            assert main(run) == 0
        assert evaluated == ["answers"]
        assert f"{done}: done before" in capsys.readouterr().out
        assert (done / "results.json").read_bytes() == written
        monkeypatch.setattr("minillm_trl.cli.models.load_model", no_loading)
        assert main(run) == 0

    def test_results_of_other_settings_are_not_taken_for_done(self, tmp_path, tasks, model_dir, capsys, monkeypatch):
        write_choices(tasks, fewshot_split="test")
        run = self.arguments(tmp_path, model_dir("llama"), "choices")
        assert main([*run, "--limit", "2"]) == 0
        assert read(tmp_path / "out" / "choices")["settings"]["prompts"] == 2
        monkeypatch.setattr("minillm_trl.cli.models.load_model", no_loading)
        folder = tmp_path / "out" / "choices"
        for options, change in (
            (["--limit", "3"], "prompts=2, now 3"),
            (["--limit", "2", "--num_fewshot", "1"], "num_fewshot=0, now 1"),
            (["--limit", "2", "--dtype", "bfloat16"], "dtype='auto', now 'bfloat16'"),
            (["--limit", "2", "--apply_chat_template"], "apply_chat_template=False, now True"),
        ):
            assert main([*run, *options]) == 2
            assert f"{folder} holds results of {change}. Delete this folder" in capsys.readouterr().err
        write_choices(tasks, doc_to_text="Question: {{question}}", fewshot_split="test")
        assert main([*run, "--limit", "2"]) == 2
        assert f"{folder} holds results of definition_sha256=" in capsys.readouterr().err

    def test_results_of_other_documents_and_older_than_the_weights_are_not_taken_for_done(
        self, tmp_path, tasks, model_dir, capsys
    ):
        model = tmp_path / "model"
        shutil.copytree(model_dir("llama"), model)
        write_choices(tasks)
        run = self.arguments(tmp_path, str(model), "choices")
        assert main(run) == 0
        written = (tmp_path / "out" / "choices" / "results.json").stat().st_mtime
        os.utime(model / "model.safetensors", (written + 1, written + 1))
        assert main(run) == 2
        assert f"holds results that are older than {model / 'model.safetensors'}" in capsys.readouterr().err
        os.utime(model / "model.safetensors", (0, 0))
        (tasks / "choices.jsonl").write_text((tasks / "choices.jsonl").read_text().replace("the mill", "the hill"))
        assert main(run) == 2
        assert "holds results of data_sha256=" in capsys.readouterr().err

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
        monkeypatch.setattr("minillm_trl.cli.models.load_model", no_loading)  # all that a model is needed for is there
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
        write_answers(tasks, [each.text.partition("\n")[0] for each in greedy], filter_list=filters)
        assert main(self.arguments(tmp_path, model_dir("llama"), "answers")) == 0
        results = read(tmp_path / "out" / "answers")
        assert results["settings"]["main_measure"] == "exact_match,whole"
        assert {name: each["mean"] for name, each in results["summary"].items()} == {
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
        tokenizer.chat_template = "{% for each in messages %}<{{ each['content'] }}>{% endfor %}"
        tokenizer.save_pretrained(base)
        assert main([*run, "--adapter", str(adapter), "--apply_chat_template"]) == 0
        samples = read_samples(tmp_path / "out" / "choices")
        assert samples[0]["prompt"] == f"<{QUESTIONS[0]}>"
        merged = tuned.merge_and_unload().eval()
        for sample, question in zip(samples, QUESTIONS, strict=True):
            ids = [tokenizer(f"<{question}>{choice}")["input_ids"] for choice in CHOICES]
            start = len(tokenizer(f"<{question}>")["input_ids"])
            likelihoods = [sum_log_probs(merged, each, start) for each in ids]
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


@needs_lm_eval
class TestRefusals(OwnTasks):
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        monkeypatch.setattr("minillm_trl.cli.models.load_model", no_loading)

    def refused(self, capsys, tmp_path, model: str, *names: str) -> str:
        assert main(self.arguments(tmp_path, model, *names)) == 2
        return capsys.readouterr().err

    def test_unknown_task_is_refused_with_the_nearest_names(self, tmp_path, tasks, capsys):
        write_choices(tasks)
        message = self.refused(capsys, tmp_path, "none", "choises")
        assert f"'choises' is no task, group or tag of lm-eval, nor a valid YAML in {tasks}. Did you mean" in message
        assert "'choices'?" in message
        message = self.refused(capsys, tmp_path, "none", "choices", "choices")
        assert "--tasks names 'choices' twice" in message

    def test_missing_folder_and_data_are_named(self, tmp_path, tasks, capsys):
        assert f"--include_path {tasks}: there is no such folder" in self.refused(capsys, tmp_path, "none", "choices")
        write_choices(tasks)
        (tasks / "choices.jsonl").unlink()
        assert "--tasks: choices cannot be loaded: " in self.refused(capsys, tmp_path, "none", "choices")

    def test_code_of_the_model_runs_only_with_leave(self, tmp_path, tasks, capsys, monkeypatch, model_dir):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
        write_answers(tasks, ["a"] * 5, name="program", unsafe_code=True, tag="programs")
        (tasks / "all.yaml").write_text("group: all\ntask: [program]\n")
        for name in ("program", "programs", "all"):
            message = self.refused(capsys, tmp_path, "none", name)
            assert "--tasks: program runs code that the model writes" in message
            assert "add --confirm_run_unsafe_code" in message
        run = self.arguments(tmp_path, model_dir("llama"), "program", "--confirm_run_unsafe_code")
        assert main(run) == 2
        assert "environment variable HF_ALLOW_CODE_EVAL=1" in capsys.readouterr().err
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
        monkeypatch.setattr("minillm_trl.cli.models.load_model", load_model)
        assert main(run) == 0
        assert read(tmp_path / "out" / "program")["settings"]["prompts"] == 5

    def test_number_of_examples_that_a_task_cannot_have_is_refused(self, tmp_path, tasks, capsys):
        write_choices(tasks, num_fewshot=0, fewshot_split="test")
        message = self.refused(capsys, tmp_path, "none", "choices", "--num_fewshot", "2")
        assert "--num_fewshot 2: choices is defined without examples" in message
        write_choices(tasks, fewshot_split="test")
        message = self.refused(capsys, tmp_path, "none", "choices", "--num_fewshot", "9")
        assert "--num_fewshot 9: choices has not as many examples" in message

    def test_task_without_room_for_a_prompt_is_refused(self, tmp_path, tasks, capsys, model_dir):
        write_answers(tasks, ["a"] * 5, generation_kwargs={"until": ["\n"]})  # lm-eval's limit of 256
        message = self.refused(capsys, tmp_path, model_dir("llama"), "answers")
        assert "--tasks: answers lets the model write 256 tokens, which leaves no room for a prompt" in message
        assert "in a context of 128 tokens" in message

    def test_group_that_is_no_mean_over_documents_is_refused(self, tmp_path, tasks, capsys):
        write_choices(tasks, "one", slice(0, 3))
        write_choices(tasks, "two", slice(3, 5))
        metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
        group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}
        (tasks / "both.yaml").write_text(yaml.safe_dump(group))
        message = self.refused(capsys, tmp_path, "none", "both")
        assert "both is the mean of tasks of different size, not of documents. Name its tasks one by one: " in message
        for name in ("one", "two"):
            write_choices(tasks, name, metric_list=[{"metric": "mcc", "aggregation": "matthews_corrcoef"}])
        message = self.refused(capsys, tmp_path, "none", "both")
        assert "no metric of both is a mean over the documents of all its tasks. Name its tasks one by one" in message
