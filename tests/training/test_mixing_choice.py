"""How a run mixes: as configured, or as measured at its first rollout and kept from then on."""

import itertools
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model
from peft import LoraConfig
from test_rollout_sampler import PROMPTS, build_sampler
from test_trainer import make_trainer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minillm_trl.training.mixing_choice
from minillm_trl import MiniLLMConfig
from minillm_trl.training.mixing_choice import MixingChoice, measure_mixing


def recorded_completions(trainer) -> list[list[list[int]]]:
    """Train; return the completions of each rollout, whose scores must be those of plain forward passes."""
    score, batches = trainer.scoring.training_batch, []

    def recorded(model, batch, *args):
        scored = score(model, batch, *args)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        again = score(model, {name: batch[name] for name in names}, 0.5)
        behavior = [each.batch["old_per_token_logps"] for each in (scored, again)]
        torch.testing.assert_close(*behavior, rtol=1e-4, atol=1e-4)
        batches.append(batch["completion_ids"].tolist())
        return scored

    trainer.scoring.training_batch = recorded
    trainer.train()
    return batches


SPECULATIVE = {"mixing": "speculative", "teacher_mixed_alpha": 0.5, "max_steps": 2, "num_iterations": 1}


def test_speculative_rollouts_do_not_depend_on_the_batch_and_are_scored_as_the_mixture(tmp_path):
    trainers = [make_trainer(tmp_path, **SPECULATIVE, **options) for options in ({}, {"sampling_batch_size": 3})]
    found = [recorded_completions(trainer) for trainer in trainers]
    assert found[0][0] == found[1][0]


@pytest.mark.parametrize("bits", [32, 4])
def test_speculation_drafts_with_the_adapter_of_the_student(tmp_path, model_dir, bits: int):
    options = {}
    if bits == 4:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        options["quantization_config"] = BitsAndBytesConfig(**nf4, llm_int8_skip_modules=["lm_head"])
    student = AutoModelForCausalLM.from_pretrained(model_dir("llama"), **options)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    settings = SPECULATIVE | {"max_steps": 4, "learning_rate": 0.05}
    trainer = make_trainer(tmp_path, family="llama", student=student, peft_config=adapter, **settings)
    rollouts = recorded_completions(trainer)  # the second one after an update of the adapter
    assert len(rollouts) == 2


@dataclass
class FakeSampler:
    """Samples four tokens in the seconds of a list, one by one, and notes what it is asked for."""

    mixing: str = "coins"
    alpha: float = 0.5
    seconds: dict[str, list[float]] = field(default_factory=dict)
    asked: list[tuple] = field(default_factory=list)
    now: list[float] = field(default_factory=lambda: [100.0])

    def sample(self, student, prompt_ids, keys, coin_key, length) -> SimpleNamespace:
        self.asked.append((self.mixing, len(prompt_ids), len(set(keys)), length))
        if self.seconds:
            self.now[0] += self.seconds[self.mixing].pop(0)
        return SimpleNamespace(completions=[[1, 2, 3], [4]])


class OneOfTwo:
    """An accelerator of one of two processes; the other one takes the times of `other`."""

    device, num_processes = torch.device("cpu"), 2

    def __init__(self, is_main_process: bool, other: list[float]):
        self.is_main_process = is_main_process
        self.other = torch.tensor(other)

    def reduce(self, own: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return (own + self.other) / (1 if reduction == "sum" else 2)


class TestAuto:
    @staticmethod
    def fake(monkeypatch: pytest.MonkeyPatch, faster: str) -> list[int]:
        calls = []

        def measure(sampler, student, prompt_ids, length):
            calls.append(len(prompt_ids))
            return {name: 1.0 if name == faster else 2.0 for name in ("coins", "speculative")}

        monkeypatch.setattr(minillm_trl.training.mixing_choice, "measure_mixing", measure)
        return calls

    @pytest.mark.parametrize("faster", ["coins", "speculative"])
    def test_run_is_that_of_the_faster_way(self, tmp_path, monkeypatch, caplog, faster: str):
        calls = self.fake(monkeypatch, faster)
        runs = [make_trainer(tmp_path, mixing=mixing, max_steps=2) for mixing in ("auto", faster)]
        with caplog.at_level(logging.WARNING):
            for trainer in runs:
                trainer.train()
        assert len(calls) == 1
        assert f"mixing='auto' chose '{faster}'" in caplog.text
        assert torch.equal(*map(weights, runs))

    def test_first_rollout_is_measured_and_no_evaluation(self, monkeypatch):
        choice, student = MixingChoice("auto", Accelerator(cpu=True), is_sharded=False), build_model("gpt2", 40)
        assert choice.applied_to(alone := build_sampler(0.0), student, PROMPTS, 6) is alone
        assert choice.method == "auto"
        chosen = choice.applied_to(build_sampler(0.5), student, PROMPTS, 6).mixing
        assert chosen == choice.method in ("coins", "speculative")
        self.fake(monkeypatch, next(name for name in ("coins", "speculative") if name != chosen))
        assert choice.applied_to(build_sampler(0.5), student, PROMPTS, 6).mixing == chosen
        assert choice.state() == {"mixing": chosen}
        choice.reset()
        assert choice.method == "auto"

    def test_resumed_run_keeps_the_choice(self, tmp_path, monkeypatch):
        options = {"mixing": "auto", "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "num_iterations": 1}
        self.fake(monkeypatch, "speculative")
        whole = make_trainer(tmp_path, **options)
        whole.train()
        calls = self.fake(monkeypatch, "coins")  # would now choose the other one
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert calls == []
        assert torch.equal(weights(whole), weights(resumed))

    def test_saved_choice_is_kept_and_a_configured_way_wins(self):
        auto, coins = (MixingChoice(mixing, Accelerator(cpu=True), is_sharded=False) for mixing in ("auto", "coins"))
        auto.restore({})  # of an older checkpoint
        assert auto.method == "auto"
        for choice in (auto, coins):
            choice.restore({"mixing": "speculative"})
        assert (auto.method, coins.method) == ("speculative", "coins")

    @pytest.mark.parametrize("is_main", [True, False])
    def test_processes_decide_together(self, monkeypatch, caplog, is_main: bool):
        self.fake(monkeypatch, "coins")  # 1 and 2 seconds here
        choice = MixingChoice("auto", OneOfTwo(is_main, [0.006, -0.996]), is_sharded=False)
        with caplog.at_level(logging.WARNING):
            choice.applied_to(FakeSampler(), build_model("gpt2", 40), PROMPTS, 6)
        assert choice.method == "speculative"
        assert ("503.00 ms with coins and 502.00 ms with speculative" in caplog.text) is is_main

    @pytest.mark.parametrize(("length", "measured"), [(10, 10), (64, 64), (300, 64)])
    def test_measurement_is_of_a_few_short_rows_twice(self, length: int, measured: int):
        sampler = FakeSampler()
        choice = MixingChoice("auto", Accelerator(cpu=True), is_sharded=False)
        choice.applied_to(sampler, build_model("gpt2", 40), [[1]] * 9, length)
        assert sampler.asked == [("coins", 8, 8, measured), ("speculative", 8, 8, measured)] * 2

    def test_measurement_is_the_least_time_of_a_token(self, monkeypatch):
        sampler = FakeSampler(seconds={"coins": [6.0, 3.0], "speculative": [2.0, 8.0]})
        monkeypatch.setattr(minillm_trl.training.mixing_choice.time, "process_time", lambda: sampler.now[0])
        found = measure_mixing(sampler, SimpleNamespace(device=torch.device("cpu")), [[1], [2]], 4)
        assert found == {"coins": 0.75, "speculative": 0.5}

    def test_measurement_times_both_ways_and_leaves_random_state_alone(self):
        student, sampler = build_model("gpt2", 40, seed=0), build_sampler(0.5)
        state = torch.get_rng_state()
        found = measure_mixing(sampler, student, PROMPTS, 6)
        assert found.keys() == {"coins", "speculative"}
        assert all(value > 0 for value in found.values())
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_time_is_elapsed_unless_the_student_is_on_a_cpu(self, monkeypatch, device: str):
        """CPU-seconds leave out what an accelerator does; a machine with a GPU may train on its CPU."""
        synchronised, clocks = [], {"process_time": itertools.count(1), "perf_counter": itertools.count(1)}
        for name, ticks in clocks.items():
            monkeypatch.setattr(minillm_trl.training.mixing_choice.time, name, lambda ticks=ticks: next(ticks))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
        monkeypatch.setattr(torch.accelerator, "synchronize", synchronised.append)
        student = SimpleNamespace(device=torch.device(device))
        measure_mixing(FakeSampler(), student, [[1]], 4)
        used = {name for name, ticks in clocks.items() if next(ticks) > 1}
        assert used == ({"process_time"} if device == "cpu" else {"perf_counter"})
        assert synchronised == ([] if device == "cpu" else [torch.device("mps")] * 4)


def test_sharded_teacher_is_refused():
    with pytest.raises(ValueError, match="mixing='speculative' does not work with a teacher that is sharded"):
        MixingChoice("speculative", Accelerator(cpu=True), is_sharded=True)
    assert MixingChoice("coins", Accelerator(cpu=True), is_sharded=True).method == "coins"


@pytest.mark.parametrize(
    ("field", "value"), [("teacher_mixed_alpha", 0.0), ("shard_teacher", True), ("compile_rollouts", "inductor")]
)
@pytest.mark.parametrize("mixing", ["speculative", "auto"])
def test_settings_that_it_cannot_serve_are_refused(tmp_path, field: str, value, mixing: str):
    with pytest.raises(ValueError, match=f"mixing='{mixing}' does not work with {field}={value!r}"):
        MiniLLMConfig(output_dir=str(tmp_path), use_cpu=True, mixing=mixing, **{field: value})
