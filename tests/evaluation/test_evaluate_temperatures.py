"""`evaluate --temperatures`: each decoding in a folder of its own, on the test and the validation split."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer, run_module
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from minillm_trl.cli import main
from minillm_trl.evaluation import task_measures
from minillm_trl.evaluation.decodings import Decoding, is_reserved
from minillm_trl.evaluation.divergence import completion_losses
from minillm_trl.evaluation.evaluate import evaluate_model
from minillm_trl.evaluation.parts import Parts
from minillm_trl.evaluation.task_measures import SharedMeasures, TaskMeasures

DECODINGS = ("temperature_1.0", "temperature_0.5", "greedy")
TEMPERATURES = ["--temperatures", "1.0", "0.5", "greedy"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three prompts for testing, two others for validation."""
    splits = {"test": ["the mill", "the pub near", "the city"], "validation": ["the river", "the food is"]}
    (tmp_path / "data").mkdir()
    for split, prompts in splits.items():
        rows = [{"prompt": prompt, "references": ["a cheap pub near the river"]} for prompt in prompts]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def words(data: Path, model: str, output: Path, *more: str) -> list[str]:
    options = ["--seeds", "1", "2", "--max_new_tokens", "6", "--no_repeat_ngram_size", "0", "--dtype", "float32"]
    return ["evaluate", "--model", model, "--dataset", str(data), "--output_dir", str(output), *options, *more]


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def outputs(folder: Path) -> list[list[str]]:
    return [json.loads(line)["outputs"] for line in (folder / "samples.jsonl").read_text().splitlines()]


class TestDecodings:
    def test_folders(self):
        assert [Decoding(value).folder for value in (1.0, 0.85, None)] == [
            "temperature_1.0",
            "temperature_0.85",
            "greedy",
        ]
        assert all(map(is_reserved, ("greedy", "validation", "temperature_2.0")))
        assert not any(map(is_reserved, ("dolly", "greedy_search", "temperature")))

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_temperature_must_be_positive(self, temperature: float):
        with pytest.raises(ValueError, match=str(temperature)):
            Decoding(temperature)

    def test_each_is_what_its_own_option_gives(self, tmp_path, data, model_dir):
        teacher = ["--teacher", model_dir("llama", 1, 48)]
        model = model_dir("llama")
        assert main(words(data, model, tmp_path / "all", *teacher, *TEMPERATURES)) == 0
        assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(DECODINGS)
        found = {name: read(tmp_path / "all" / name) for name in DECODINGS}
        for name, result in found.items():
            assert (result["settings"]["decoding"], result["settings"]["teacher_temperature"]) == (name, 1.0)
        singles = {
            "temperature_1.0": ["--temperature", "1", *teacher],
            "temperature_0.5": ["--temperature", "0.5", "--teacher_temperature", "1", *teacher],
        }
        for name, options in singles.items():
            assert main(words(data, model, tmp_path / name, *options)) == 0
            single = read(tmp_path / name)
            assert single["per_prompt"] == found[name]["per_prompt"]
            assert outputs(tmp_path / name) == outputs(tmp_path / "all" / name)
            assert single["settings"]["temperature"] == found[name]["settings"]["temperature"]
            assert single["settings"]["decoding"] is None
        means = {name: {key: value["mean"] for key, value in found[name]["summary"].items()} for name in DECODINGS}
        entropies = [means[name]["entropy_per_token"] for name in DECODINGS]
        assert entropies[0] > entropies[1] > entropies[2] == 0
        assert found["greedy"]["settings"]["seeds"] == []
        assert found["greedy"]["settings"]["greedy"] is True
        command = words(data, model, tmp_path / "greedy", "--greedy")
        command = [word for word in command if word not in ("--seeds", "1", "2")]
        assert main(command) == 0
        assert outputs(tmp_path / "greedy") == outputs(tmp_path / "all" / "greedy")

    def test_teacher_temperature_acts(self, tmp_path, data, model_dir):
        teacher = ["--teacher", model_dir("llama", 1, 48)]
        options = {"default": [], "2": ["--teacher_temperature", "2"]}
        found = {}
        for name, more in options.items():
            run = words(data, model_dir("llama"), tmp_path / name, *teacher, "--temperatures", "0.5", "greedy", *more)
            assert main(run) == 0
            for decoding in ("temperature_0.5", "greedy"):
                found[name, decoding] = read(tmp_path / name / decoding)["summary"]["reverse_kl"]["mean"]
        for decoding in ("temperature_0.5", "greedy"):
            assert found["default", decoding] != pytest.approx(found["2", decoding], rel=1e-3)

    def test_teacher_is_compared_with_itself_at_its_own_temperature(self, tmp_path, data, model_dir):
        teacher = model_dir("llama", 1, 48)
        more = ["--teacher", teacher, "--forward_kl", "--exposure_bias_samples", "1", *TEMPERATURES]
        assert main(words(data, teacher, tmp_path / "out", *more)) == 0
        for name in ("reverse_kl", "forward_kl"):
            found = [read(tmp_path / "out" / decoding)["summary"].get(name) for decoding in DECODINGS]
            assert found[0]["mean"] == pytest.approx(0, abs=1e-5)
            assert found[1]["mean"] > 0.01
            assert (found[2] is None) == (name == "forward_kl")
        assert all(read(tmp_path / "out" / decoding)["exposure_bias"] is None for decoding in DECODINGS)

    def test_teacher_samples_once_for_all_temperatures(self, tmp_path, data, model_dir, monkeypatch):
        more = ["--teacher", model_dir("llama", 1, 48), "--forward_kl"]
        found = {}
        for temperatures in (["1.0"], ["0.5"], ["1.0", "0.5"]):
            sampled = []

            def sample(self, model, temperature, seed, bar, sampled=sampled, original=TaskMeasures._sample):
                sampled.append((model is self.teacher, seed))
                return original(self, model, temperature, seed, bar)

            with monkeypatch.context() as patch:
                patch.setattr(TaskMeasures, "_sample", sample)
                folder = tmp_path / "-".join(temperatures)
                assert main(words(data, model_dir("llama"), folder, *more, "--temperatures", *temperatures)) == 0
            assert [seed for is_teacher, seed in sampled if is_teacher] == [1, 2]
            for temperature in temperatures:
                summary = read(folder / f"temperature_{temperature}")["summary"]
                assert found.setdefault(temperature, summary) == summary

    def test_loss_of_the_references_is_measured_once(self, tmp_path, data, model_dir, monkeypatch):
        calls = []

        def losses(*arguments, **options):
            calls.append(arguments)
            return completion_losses(*arguments, **options)

        monkeypatch.setattr(task_measures, "completion_losses", losses)
        assert main(words(data, model_dir("llama"), tmp_path / "out", *TEMPERATURES)) == 0
        assert len(calls) == 1
        first, *others = (read(tmp_path / "out" / decoding)["summary"]["loss"] for decoding in DECODINGS)
        assert others == [first, first]

    def test_teacher_samples_are_shared_at_the_same_temperature_only(self):
        """Without `teacher_temperature`, the teacher samples at the temperature of each evaluation."""
        tokenizer = build_tokenizer()
        student, teacher = build_model("gpt2", len(tokenizer)), build_model("gpt2", len(tokenizer), seed=1)
        dataset = Dataset.from_dict({"prompt": ["the mill", "the pub near"]})
        options = {"seeds": [1], "max_new_tokens": 5, "teacher": teacher, "forward_kl": True, "progress": False}
        shared = SharedMeasures()
        for temperature in (1.0, 0.3):
            alone, found = (
                evaluate_model(student, tokenizer, dataset, temperature=temperature, shared=measures, **options)
                for measures in (None, shared)
            )
            assert found.per_prompt == alone.per_prompt

    def test_adapter_on_the_teacher_is_not_the_teacher(self, tmp_path, data, model_dir):
        model = model_dir("llama")
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapter = tmp_path / "adapter"
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(adapter)
        assert main(words(data, model, tmp_path / "out", "--teacher", model, "--adapter", str(adapter))) == 0
        assert read(tmp_path / "out")["summary"]["reverse_kl"]["mean"] > 0

    def test_exposure_bias_is_measured_at_the_teacher_s_temperature(self, tmp_path, data, model_dir):
        more = ["--teacher", model_dir("llama", 1, 48), "--exposure_bias_samples", "1", *TEMPERATURES]
        assert main(words(data, model_dir("llama"), tmp_path / "out", *more)) == 0
        exposed = [read(tmp_path / "out" / decoding)["exposure_bias"] is not None for decoding in DECODINGS]
        assert exposed == [True, False, False]


class TestGreedy:
    def test_reverse_kl_is_that_of_a_point_mass(self):
        """-log p(y), computed from the teacher's logits for the greedy completion."""
        tokenizer = build_tokenizer()
        student, teacher = build_model("gpt2", len(tokenizer)), build_model("gpt2", len(tokenizer), seed=1)
        dataset = Dataset.from_dict({"prompt": ["the mill", "the pub near"]})
        found = evaluate_model(
            student,
            tokenizer,
            dataset,
            seeds=None,
            max_new_tokens=5,
            teacher=teacher,
            teacher_temperature=2.0,
            progress=False,
        )
        for row, sample in zip(found.per_prompt, found.samples, strict=True):
            ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
            total = 0.0
            for _ in range(int(row["length"])):
                token = student(ids).logits[0, -1].argmax()
                total -= torch.log_softmax(teacher(ids).logits[0, -1] / 2.0, dim=-1)[token].item()
                ids = torch.cat([ids, token[None, None]], dim=1)
            assert row["reverse_kl"] == pytest.approx(total, rel=1e-4)
            assert row["reverse_kl_per_token"] == pytest.approx(total / row["length"], rel=1e-4)
            assert row["entropy_per_token"] == 0

    def test_it_is_the_limit_of_low_temperatures(self):
        tokenizer = build_tokenizer()
        student, teacher = build_model("gpt2", len(tokenizer)), build_model("gpt2", len(tokenizer), seed=1)
        dataset = Dataset.from_dict({"prompt": ["the mill", "the pub near"]})
        options = {"max_new_tokens": 5, "teacher": teacher, "teacher_temperature": 1.0, "progress": False}
        greedy = evaluate_model(student, tokenizer, dataset, seeds=None, **options)
        cold = evaluate_model(student, tokenizer, dataset, seeds=[1], temperature=1e-4, **options)
        for one, two in zip(greedy.per_prompt, cold.per_prompt, strict=True):
            assert one["reverse_kl"] == pytest.approx(two["reverse_kl"], rel=1e-3)
            assert two["entropy_per_token"] == pytest.approx(0, abs=1e-3)

    @pytest.mark.parametrize("measure", [{"forward_kl": True}, {"exposure_bias_samples": 1}])
    def test_measures_of_two_distributions_need_samples(self, measure: dict):
        tokenizer = build_tokenizer()
        student, dataset = build_model("gpt2", len(tokenizer)), Dataset.from_dict({"prompt": ["the mill"]})
        with pytest.raises(ValueError, match="seeds=None"):
            evaluate_model(student, tokenizer, dataset, seeds=None, max_new_tokens=2, teacher=student, **measure)

    def test_softmax_of_the_loss_is_over_the_given_rows(self):
        model = build_model("gpt2", 40)
        logits = model(torch.tensor([[3, 4]])).logits[0, -1, :30] / 0.5
        (found,) = completion_losses(model, [[3, 4]], [[7]], vocab_size=30, temperature=0.5)
        assert found == pytest.approx([-torch.log_softmax(logits, dim=-1)[7].item()], rel=1e-5)


class TestValidation:
    def test_validation_has_the_same_decodings_on_its_own_prompts(self, tmp_path, data, model_dir):
        more = ["--teacher", model_dir("llama", 1, 48), "--forward_kl", "--exposure_bias_samples", "1"]
        more += ["--validation_split", "validation", *TEMPERATURES]
        assert main(words(data, model_dir("llama"), tmp_path / "out", *more)) == 0
        for decoding in DECODINGS:
            test, validation = (read(tmp_path / "out" / part / decoding) for part in (".", "validation"))
            assert (test["settings"]["split"], test["settings"]["prompts"]) == ("test", 3)
            assert (validation["settings"]["split"], validation["settings"]["prompts"]) == ("validation", 2)
            assert test["settings"]["data_sha256"] != validation["settings"]["data_sha256"]
            assert {"rouge_l", "reverse_kl"} <= validation["summary"].keys()
            assert "forward_kl" not in validation["summary"]
            assert validation["exposure_bias"] is None
        assert "forward_kl" in read(tmp_path / "out" / "temperature_0.5")["summary"]

    def test_data_without_splits_are_refused(self, tmp_path, data, capsys):
        run = words(data / "test.jsonl", "none", tmp_path / "out", *TEMPERATURES, "--validation_split", "validation")
        assert main(run) == 2
        assert "--validation_split validation: " in capsys.readouterr().err

    def test_missing_split_is_named_with_what_to_do(self, tmp_path, data, capsys):
        run = words(data, "none", tmp_path / "out", *TEMPERATURES, "--validation_split", "dev")
        assert main(run) == 2
        message = capsys.readouterr().err
        assert f"--validation_split dev: {data}: holds no file of the split 'dev'" in message
        assert "without --validation_split" in message

    def test_data_without_references_are_refused(self, tmp_path, data, capsys):
        for split in ("test", "validation"):
            rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
            (data / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        run = words(data, "none", tmp_path / "out", *TEMPERATURES, "--validation_split", "validation")
        assert main(run) == 2
        assert "--validation_split validation chooses by Rouge-L" in capsys.readouterr().err


class TestResuming:
    def test_finished_decodings_are_skipped_and_an_interrupted_one_resumes(
        self, tmp_path, data, model_dir, monkeypatch, capsys
    ):
        whole = words(data, model_dir("llama"), tmp_path / "whole", *TEMPERATURES)
        killed = words(data, model_dir("llama"), tmp_path / "killed", *TEMPERATURES)
        assert main(whole) == 0
        put = Parts.put

        def kill(self, name, value):
            put(self, name, value)
            if self.folder.parent.name == "temperature_0.5" and name == "seed-1":
                raise KeyboardInterrupt

        monkeypatch.setattr(Parts, "put", kill)
        assert main(killed) == 130
        monkeypatch.setattr(Parts, "put", put)
        finished = tmp_path / "killed" / "temperature_1.0" / "results.json"
        before = finished.stat().st_mtime_ns
        capsys.readouterr()
        assert main(killed) == 0
        assert f"{finished.parent}: done before" in capsys.readouterr().out
        assert finished.stat().st_mtime_ns == before
        for decoding in DECODINGS:
            for name in ("results.json", "samples.jsonl"):
                paths = [tmp_path / run / decoding / name for run in ("whole", "killed")]
                assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_another_temperature_is_added_to_finished_ones(self, tmp_path, data, model_dir, capsys):
        run = words(data, model_dir("llama"), tmp_path / "out", "--temperatures", "1")
        assert main(run) == 0
        assert main([*run, "0.7"]) == 0
        assert f"{tmp_path / 'out' / 'temperature_1.0'}: done before" in capsys.readouterr().out
        assert read(tmp_path / "out" / "temperature_0.7")["settings"]["temperature"] == 0.7

    def test_results_of_both_kinds_do_not_share_a_folder(self, tmp_path, data, model_dir, capsys):
        plain = words(data, model_dir("llama"), tmp_path / "out")
        assert main(plain) == 0
        assert main([*plain, *TEMPERATURES]) == 2
        assert f"{tmp_path / 'out'} holds results without --temperatures" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out")
        assert main([*plain, "--temperatures", "0.5"]) == 0
        assert main(plain) == 2
        assert f"{tmp_path / 'out'} holds results of --temperatures" in capsys.readouterr().err


def test_yaml_and_tasks(tmp_path, data, model_dir):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"tasks:\n  mill: {data}\ntemperatures: [1, greedy]\nvalidation_split: validation\nseeds: [1]\n"
        "max_new_tokens: 4\n"
    )
    run = ["evaluate", "--config", str(config), "--model", model_dir("llama"), "--output_dir", str(tmp_path / "out")]
    assert main(run) == 0
    found = sorted(str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/**/results.json"))
    folders = ["mill/greedy", "mill/temperature_1.0", "mill/validation/greedy", "mill/validation/temperature_1.0"]
    assert found == folders


@pytest.mark.parametrize("options", [["--greedy", "--max_new_tokens", "4"], ["--label_words", " river", " mill"]])
def test_temperature_1_of_a_yaml_is_no_obstacle_where_temperatures_have_no_effect(tmp_path, data, model_dir, options):
    rows = [{"prompt": "the", "completion": "river"}, {"prompt": "a", "completion": "mill"}]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "eval.yaml"
    config.write_text(f"dataset: {data}\ntemperature: 1.0\n")
    run = ["evaluate", "--config", str(config), "--model", model_dir("llama"), "--output_dir", str(tmp_path / "out")]
    assert main([*run, *options]) == 0


def test_wrong_values_in_a_yaml_are_named_with_their_line(tmp_path, capsys):
    path = tmp_path / "eval.yaml"
    for value in ("[1.0, warm]", "[0]", "true"):
        path.write_text(f"dataset: e2e\ntemperatures: {value}\n")
        assert main(["evaluate", "--config", str(path), "--model", "none", "--output_dir", str(tmp_path)]) == 2
        assert f"{path}:2: temperatures: expected a temperature above 0 or greedy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperatures", "warm"], "expected a temperature above 0 or `greedy`, got 'warm'"),
        (["--temperatures", "-1"], "got '-1'"),
        (["--temperatures", "1", "1.0"], "--temperatures names temperature 1 twice"),
        (["--temperatures", "0.5", "--temperature", "1"], "--temperatures and --temperature exclude each other"),
        (["--temperatures", "0.5", "--greedy"], "--temperatures and --greedy exclude each other"),
        (["--temperatures", "greedy"], "--seeds has no effect with `--temperatures greedy`"),
        (["--validation_split", "validation"], "--validation_split chooses among --temperatures"),
        (["--temperatures", "1", "--validation_split", "test"], "--validation_split test is --split too"),
        (["--teacher_temperature", "1"], "--teacher_temperature needs --teacher"),
        (["--teacher", "t", "--teacher_temperature", "0"], "--teacher_temperature must be positive, got 0.0"),
        (["--temperatures", "1", "--forward_kl"], "--forward_kl needs --teacher"),
        (
            ["--temperatures", "0.5", "--teacher", "t", "--exposure_bias_samples", "1"],
            "the teacher's temperature, and 1 is not among --temperatures",
        ),
        (["--label_words", "a", "b", "--temperatures", "1"], "has no effect with --label_words"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, data, capsys, options: list[str], message: str):
    assert main(words(data, "none", tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["greedy", "validation", "temperature_1.0"])
def test_task_cannot_have_the_name_of_a_decoding(tmp_path, data, capsys, name: str):
    run = ["evaluate", "--model", "none", "--output_dir", str(tmp_path / "out"), "--tasks", f"{name}={data}"]
    assert main([*run, *TEMPERATURES]) == 2
    assert f"--tasks {name}: " in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_give_the_results_of_one(tmp_path, data, model_dir):
    more = ["--teacher", model_dir("llama", 1, 48), "--validation_split", "validation", *TEMPERATURES]
    assert main(words(data, model_dir("llama"), tmp_path / "one", *more)) == 0
    launch = ["--accelerate_config", "cpu", "--num_processes", "2"]
    result = run_module("minillm_trl", *words(data, model_dir("llama"), tmp_path / "two", *more, *launch))
    assert result.returncode == 0, result.stderr
    for part in (".", "validation"):
        for decoding in DECODINGS:
            one, two = (tmp_path / run / part / decoding for run in ("one", "two"))
            assert outputs(one) == outputs(two)
            assert read(one)["settings"] == read(two)["settings"]
            for a, b in zip(read(one)["per_prompt"], read(two)["per_prompt"], strict=True):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
