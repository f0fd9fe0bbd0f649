"""`minillm-trl evaluate`: results that a kill, the batch size and the number of processes leave alone."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, run_module
from transformers import AutoTokenizer

from minillm_trl.cli import main
from minillm_trl.evaluation.parts import Parts
from minillm_trl.evaluation.tasks import find_tasks

REFERENCES = ["the mill", "a cheap pub near the river and the mill", "the city", "food", "serves italian food"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "the mill " * (i % 3) + f"{i}", "references": [reference]} for i, reference in enumerate(REFERENCES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(rows: Path, model: str, output: Path, *more: str) -> list[str]:
    options = ["--seeds", "1", "2", "--max_new_tokens", "6", "--dtype", "float32"]
    return ["evaluate", "--model", model, "--dataset", str(rows), "--output_dir", str(output), *options, *more]


def read(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return json.loads((folder / "results.json").read_text()), list(map(json.loads, lines))


@pytest.fixture
def teacher(model_dir) -> list[str]:
    return ["--teacher", model_dir("llama", 1, 48), "--forward_kl", "--exposure_bias_samples", "2"]


def test_results_hold_every_measure_and_each_sample_s_scores(tmp_path, rows, model_dir, teacher):
    assert main(words(rows, model_dir("llama"), tmp_path / "out", *teacher)) == 0
    results, samples = read(tmp_path / "out")
    both = {f"{name}{suffix}" for name in ("reverse_kl", "forward_kl") for suffix in ("", "_per_token")}
    sampled = {"rouge_l", "exact_match", "length", "eos_rate", "repeated_4grams", "entropy_per_token", *both}
    of_a_prompt = {"best_rouge_l", "distinct_outputs", "distinct_4grams", "self_bleu", "loss"}
    assert results["summary"].keys() == results["per_prompt"][0].keys() == sampled | of_a_prompt
    assert results["by_seed"].keys() == samples[0]["scores"].keys() == sampled
    for name in sampled:
        means = [sum(sample["scores"][name][seed] for sample in samples) / len(samples) for seed in (0, 1)]
        assert results["by_seed"][name] == pytest.approx(means)
        assert results["summary"][name]["mean"] == pytest.approx(sum(means) / 2)
    assert results["settings"]["no_repeat_ngram_size"] == 6
    assert results["corpus"].keys() == {"distinct_4grams"}
    exposure = results["exposure_bias"]
    assert len(exposure["student"]) == len(exposure["teacher"]) == len(exposure["excess_error"])
    assert (exposure["samples"], exposure["prompts"]) == (2, 5)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_loss_of_the_references_is_left_out(tmp_path, rows, model_dir, monkeypatch, capsys):
    assert main(words(rows, model_dir("llama"), tmp_path / "with")) == 0
    with_loss = read(tmp_path / "with")[0]["per_prompt"]
    monkeypatch.setattr("minillm_trl.evaluation.task_measures.completion_losses", None)  # it is not even measured
    assert main(words(rows, model_dir("llama"), tmp_path / "without", "--no_loss")) == 0
    without = read(tmp_path / "without")[0]["per_prompt"]
    assert without == [{name: value for name, value in row.items() if name != "loss"} for row in with_loss]
    assert main(words(rows, model_dir("llama"), tmp_path / "with", "--no_loss")) == 2
    assert "holds results of no_loss=None, now True" in capsys.readouterr().err


def test_prompts_are_in_the_bucket_of_their_reference_s_tokens(tmp_path, rows, model_dir):
    assert main(words(rows, model_dir("llama"), tmp_path / "out")) == 0
    results, _ = read(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    lengths = [len(tokenizer.tokenize(reference)) for reference in REFERENCES]
    assert lengths == [3, 14, 3, 2, 7]
    assert [(bucket["low"], bucket["high"], bucket["prompts"]) for bucket in results["buckets"]] == [
        (0, 5, 3),
        (6, 10, 1),
        (11, None, 1),
    ]
    losses = [row["loss"] for row in results["per_prompt"]]
    means = [bucket["summary"]["loss"]["mean"] for bucket in results["buckets"]]
    assert means == pytest.approx([(losses[0] + losses[2] + losses[3]) / 3, losses[4], losses[1]])


def test_run_that_is_killed_anywhere_ends_with_the_same_results(tmp_path, rows, model_dir, teacher, monkeypatch):
    assert main(words(rows, model_dir("llama"), tmp_path / "whole", *teacher)) == 0
    put, kills = Parts.put, 0

    def killed_after(count: int):
        def killed(self, name, value):
            nonlocal count
            put(self, name, value)
            count -= name != "settings"
            if count == 0:
                raise KeyboardInterrupt

        return killed

    command = words(rows, model_dir("llama"), tmp_path / "killed", *teacher)
    monkeypatch.setattr(Parts, "put", killed_after(1))
    while main(command) == 130:  # one part further each time
        monkeypatch.setattr(Parts, "put", killed_after(1))
        kills += 1
    assert kills == 6  # two seeds of each model, the loss and the exposure bias
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.cli
def test_run_that_sigkill_ends_goes_on_from_the_last_whole_seed(tmp_path, rows, model_dir):
    more = ["--max_new_tokens", "100", "--seeds", *map(str, range(8))]
    assert main(words(rows, model_dir("llama"), tmp_path / "whole", *more)) == 0
    command = words(rows, model_dir("llama"), tmp_path / "killed", *more)
    process = subprocess.Popen([sys.executable, "-m", "minillm_trl", *command], env=ENVIRONMENT)
    first = tmp_path / "killed" / "unfinished" / "seed-0.json"
    while not first.is_file() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    assert main(command) == 0
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_unfinished_results_of_other_settings_are_refused(tmp_path, rows, model_dir, monkeypatch, capsys):
    command = words(rows, model_dir("llama"), tmp_path / "out")
    put = Parts.put

    def killed(self, name, value):
        put(self, name, value)
        if name == "seed-1":
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "put", killed)
    assert main(command) == 130
    monkeypatch.undo()
    assert main([*command, "--temperature", "0.7"]) == 2
    folder = tmp_path / "out" / "unfinished"
    assert f"{folder} holds an unfinished evaluation with temperature=1.0; now it is 0.7" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.distributed
def test_two_processes_give_the_results_of_one(tmp_path, rows, model_dir, teacher):
    assert main(words(rows, model_dir("llama"), tmp_path / "one", *teacher)) == 0
    launch = ["--accelerate_config", "cpu", "--num_processes", "2"]
    result = run_module("minillm_trl", *words(rows, model_dir("llama"), tmp_path / "two", *teacher, *launch))
    assert result.returncode == 0, result.stderr
    (one, one_samples), (two, two_samples) = read(tmp_path / "one"), read(tmp_path / "two")
    assert [sample["outputs"] for sample in one_samples] == [sample["outputs"] for sample in two_samples]
    for a, b in zip(one["per_prompt"], two["per_prompt"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert one["exposure_bias"]["student"] == pytest.approx(two["exposure_bias"]["student"], rel=1e-4)
    assert one["settings"] == two["settings"]


def test_blocked_ngrams_change_the_samples_and_are_stated(tmp_path, rows, model_dir, capsys):
    for name, size in (("free", "0"), ("blocked", "1")):
        more = ["--max_new_tokens", "40", "--no_repeat_ngram_size", size]
        assert main(words(rows, model_dir("llama"), tmp_path / name, *more)) == 0
    output = capsys.readouterr().out
    assert "n-grams may repeat" in output
    assert "no repeated 1-grams" in output
    (free, one), (blocked, two) = read(tmp_path / "free"), read(tmp_path / "blocked")
    assert [sample["outputs"] for sample in one] != [sample["outputs"] for sample in two]
    assert free["settings"]["no_repeat_ngram_size"] == 0
    assert blocked["settings"]["no_repeat_ngram_size"] == 1


def test_greedy_decodes_once_and_without_measures_of_several_samples(tmp_path, rows, model_dir):
    command = ["evaluate", "--model", model_dir("llama"), "--dataset", str(rows), "--max_new_tokens", "6", "--greedy"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    results, samples = read(tmp_path / "out")
    assert all(len(sample["outputs"]) == 1 for sample in samples)
    assert (results["settings"]["greedy"], results["settings"]["seeds"]) == (True, [])
    assert not {"distinct_outputs", "self_bleu", "reverse_kl"} & results["summary"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--greedy"], "--greedy takes the most likely tokens: --seeds and --temperature have no effect"),
        (["--greedy", "--teacher", "t"], "--teacher measures divergences on samples"),
        (["--forward_kl"], "--forward_kl needs --teacher"),
        (["--exposure_bias_samples", "2"], "--exposure_bias_samples needs --teacher"),
        (["--no_repeat_ngram_size", "-1"], "--no_repeat_ngram_size must not be negative, got -1"),
        (["--seeds", "3", "3"], "--seeds repeats a seed: [3, 3]"),
        (["--temprature", "1"], "unknown option '--temprature'. Did you mean 'temperature'?"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, rows, capsys, options: list[str], message: str):
    assert main(words(rows, "none", tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err


class TestTasks:
    def test_names_files_and_folders(self, tmp_path, rows):
        (tmp_path / "dolly").mkdir()
        (tmp_path / "vicuna").mkdir()
        found = find_tasks(["dolly,vicuna,e2e", str(rows), "mine=owner/data", "owner/other"], tmp_path)
        assert found == {
            "dolly": str(tmp_path / "dolly"),
            "vicuna": str(tmp_path / "vicuna"),
            "e2e": "e2e",
            "rows": str(rows),
            "mine": "owner/data",
            "other": "owner/other",
        }

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("doly", "--tasks doly: no such task, file or folder.*Did you mean 'dolly'"),
            ("e2e,selfints", "--tasks selfints: no such task.*Did you mean 'selfinst'"),
            ("none/rows.jsonl", "--tasks none/rows.jsonl: no such file"),
            ("sni", "minillm-trl prepare-data --task sni --output_dir"),
            ("=x", "expected NAME=DATASET"),
            ("a/b=x", "expected NAME=DATASET"),
        ],
    )
    def test_unknown_word_is_refused_with_the_nearest_name(self, tmp_path, word: str, message: str):
        with pytest.raises(ValueError, match=message):
            find_tasks([word], tmp_path)

    def test_two_tasks_of_one_name_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="--tasks names 'e2e' twice"):
            find_tasks(["e2e", "e2e=other"], tmp_path)


class TestClassification:
    @pytest.fixture
    def reviews(self, tmp_path: Path) -> Path:
        path = tmp_path / "reviews.jsonl"
        rows = [{"prompt": f"the food {i} is", "completion": ("cheap", "italian")[i % 2]} for i in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def words(self, reviews: Path, model: str, output: Path, *more: str) -> list[str]:
        options = ["--label_words", " cheap", " italian", "--dtype", "float32"]
        return ["evaluate", "--model", model, "--dataset", str(reviews), "--output_dir", str(output), *options, *more]

    def test_accuracy_and_calibration_are_those_of_the_samples(self, tmp_path, reviews, model_dir, capsys):
        assert main(self.words(reviews, model_dir("llama"), tmp_path / "out")) == 0
        results, samples = read(tmp_path / "out")
        right = [sample["outputs"] == sample["references"] for sample in samples]
        confidence = [max(sample["probabilities"].values()) for sample in samples]
        assert results["summary"]["accuracy"]["mean"] == pytest.approx(100 * sum(right) / 6)
        assert [row["confidence"] for row in results["per_prompt"]] == confidence
        bins = [bin_ for bin_ in results["calibration"]["bins"] if bin_["count"]]
        gaps = [bin_["count"] / 6 * abs(bin_["accuracy"] - bin_["confidence"]) for bin_ in bins]
        assert results["calibration"]["ece"] == pytest.approx(sum(gaps))
        assert results["settings"]["label_words"] == [" cheap", " italian"]
        assert "ece" in capsys.readouterr().out

    @pytest.mark.distributed
    def test_two_processes_give_the_results_of_one(self, tmp_path, reviews, model_dir):
        assert main(self.words(reviews, model_dir("llama"), tmp_path / "one")) == 0
        launch = ["--accelerate_config", "cpu", "--num_processes", "2"]
        result = run_module("minillm_trl", *self.words(reviews, model_dir("llama"), tmp_path / "two", *launch))
        assert result.returncode == 0, result.stderr
        one, two = (read(tmp_path / name)[0] for name in ("one", "two"))
        assert one["calibration"]["ece"] == pytest.approx(two["calibration"]["ece"], rel=1e-5)
        assert [row["accuracy"] for row in one["per_prompt"]] == [row["accuracy"] for row in two["per_prompt"]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--seeds", "1"], "--seeds has no effect with --label_words"),
            (["--teacher", "t"], "--teacher has no effect with --label_words"),
            (["--no_loss"], "--no_loss has no effect with --label_words"),
            (["--label_words", "a", " a"], "--label_words needs at least two different words"),
            (["--label_words", " cheap", " good"], "has the completions ['italian']. Give it one of the label words"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path, reviews, capsys, options: list[str], message: str):
        assert main(self.words(reviews, "none", tmp_path / "out", *options)) == 2
        assert message in capsys.readouterr().err
