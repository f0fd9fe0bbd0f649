"""`overlap_rollouts` with QLoRA, a teacher on the student's base, and several teachers, against sampling by hand."""

import shutil
import threading
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_reliable_runs import assert_same_run
from test_trainer import PROMPTS, make_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minillm_trl import MiniLLMTrainer
from minillm_trl.models.bitsandbytes_layout import keep_4bit_layout
from minillm_trl.rollouts.keyed_random import COINS, TRAIN_TOKENS, keyed_uniforms

ALPHA, LENGTH, ROWS = 0.4, 10, 8
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
NF4 = {"quantization_config": BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["lm_head"])}
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
NAMES = ["b" if number % 3 == 1 else "a" for number in range(len(PROMPTS))]
CASES: dict[str, dict[str, Any]] = {
    "qlora": {"nf4": True},
    "qlora, nf4 teacher": {"nf4": True, "nf4_teacher": True},
    "shared base": {"shares": True},
    "shared base, not merged": {"shares": True, "merged_rollouts": False},
    "qlora, shared base": {"nf4": True, "shares": True},
    "several teachers": {"teachers": True},
    "qlora, several teachers": {"nf4": True, "teachers": True},
}


class Models:
    """Student and teachers of a case, as a trainer takes them, and loaded once more without it."""

    def __init__(self, tmp_path, model_dir, case: dict[str, Any]):
        self.folder, self.teacher_folder = model_dir("llama"), model_dir("llama", seed=1, width=48)
        self.options = {name: value for name, value in case.items() if name == "merged_rollouts"}
        self.nf4 = NF4 if case.get("nf4") else {}
        self.of_teacher = NF4 if case.get("nf4_teacher") else {}
        self.shares, self.several = case.get("shares", False), case.get("teachers", False)
        if self.shares:
            torch.manual_seed(5)
            base = AutoModelForCausalLM.from_pretrained(self.folder)
            config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
            self.teacher_folder = str(tmp_path / "teacher")
            get_peft_model(base, config).save_pretrained(self.teacher_folder)

    def trainer(self, folder, **options) -> MiniLLMTrainer:
        torch.manual_seed(7)  # of the adapter
        rows = {"prompt": PROMPTS, **({"teacher": NAMES} if self.several else {})}
        options = {"max_steps": 6, "teacher_mixed_alpha": ALPHA, "shared_coins": False, **self.options, **options}
        args = make_config(
            folder,
            overlap_rollouts=True,
            max_completion_length=LENGTH,
            teacher_shares_base=self.shares,
            teacher_model_init_kwargs=self.of_teacher or None,
            **options,
        )
        return MiniLLMTrainer(
            self.folder,
            {"a": self.teacher_folder, "b": self.second_teacher()} if self.several else self.teacher_folder,
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=build_tokenizer(),
            peft_config=LORA,
            quantization_config=self.nf4.get("quantization_config"),
        )

    def second_teacher(self):
        return build_model("llama", len(build_tokenizer()), 2, width=16)

    def student(self, adapter: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The student with the weights of an adapter, on a base of its own."""
        base = AutoModelForCausalLM.from_pretrained(self.folder, **self.nf4)
        keep_4bit_layout(base)
        model = get_peft_model(base, LORA)
        assert not model.load_state_dict(adapter, strict=False).unexpected_keys
        return model.eval()

    def teachers(self) -> list[torch.nn.Module]:
        if self.several:
            return [AutoModelForCausalLM.from_pretrained(self.teacher_folder), self.second_teacher().eval()]
        if not self.shares:
            found = AutoModelForCausalLM.from_pretrained(self.teacher_folder, **self.of_teacher)
        else:
            base = AutoModelForCausalLM.from_pretrained(self.folder, **self.nf4)
            found = PeftModel.from_pretrained(base, self.teacher_folder)
        keep_4bit_layout(found)
        return [found.eval()]


def adapter_of(trainer: MiniLLMTrainer) -> dict[str, torch.Tensor]:
    state = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return {name: weight.detach().clone() for name, weight in state.items()}


@torch.no_grad()
def next_log_probs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(dim=-1)


def sample_by_hand(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    prompt: list[int],
    ends: list[int],
    seed: int,
    step: int,
    row: int,
) -> tuple[list[int], list[float], list[float]]:
    """Sample a row: its tokens, and their log-probs under the student and under the mixture."""
    key = (seed, TRAIN_TOKENS, step, row, 0)
    uniforms, coins = keyed_uniforms(LENGTH, *key), keyed_uniforms(LENGTH, seed, COINS, *key) < ALPHA
    ids, of_student, of_mixture = list(prompt), [], []
    for uniform, coin in zip(uniforms, coins, strict=True):
        q, p = next_log_probs(student, ids), next_log_probs(teacher, ids)
        cumulative = (p if coin else q).exp().cumsum(dim=0).numpy()
        token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        ids.append(token)
        of_student.append(float(q[token]))
        of_mixture.append(float(np.logaddexp(np.log(ALPHA) + float(p[token]), np.log1p(-ALPHA) + float(q[token]))))
        if token in ends:
            break
    return ids[len(prompt) :], of_student, of_mixture


def record(trainer: MiniLLMTrainer) -> list[tuple[list[dict], dict, dict]]:
    """The rows, the batch and the student's adapter before the updates, of each rollout that will be made."""
    found = []
    make_rollout = trainer._make_rollout

    def recorded(rows: list[dict]) -> dict:
        before = adapter_of(trainer)
        batch = make_rollout(rows)
        found.append((rows, batch, before))
        return batch

    trainer._make_rollout = recorded
    return found


def watch_threads(model: torch.nn.Module) -> set[str]:
    """The names of the threads in which a module of the model will run."""
    names: set[str] = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda *unused: names.add(threading.current_thread().name))
    return names


@pytest.mark.parametrize("name", CASES)
def test_rollouts_are_those_that_the_copied_weights_sample_by_hand(tmp_path, model_dir, name: str):
    models = Models(tmp_path, model_dir, CASES[name])
    trainer = models.trainer(tmp_path / "run")
    rollouts, threads = record(trainer), watch_threads(trainer.model)
    trainer.eos_token_ids = [*trainer.eos_token_ids, *range(20, 60)]  # rows of different lengths
    trainer.train()
    assert threads == {threading.main_thread().name}  # the live student runs in no other thread
    assert trainer.model.active_adapters == ["default"]
    assert [log["rollout/staleness"] for log in trainer.state.log_history if "rollout/staleness" in log] == [0, 1, 1]
    teachers, lengths = models.teachers(), set()
    for number, (rows, batch, _) in enumerate(rollouts):
        student = models.student(rollouts[max(number - 1, 0)][2])
        for row in range(ROWS):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            teacher = teachers[NAMES[PROMPTS.index(rows[row]["prompt"])] == "b" if models.several else 0]
            tokens, of_student, of_mixture = sample_by_hand(
                student, teacher, prompt, trainer.eos_token_ids, trainer.args.seed, 2 * number, row
            )
            mask = batch["completion_mask"][row].bool()
            assert batch["completion_ids"][row][mask].tolist() == tokens, (number, row)
            assert batch["student_logps"][row][mask].tolist() == pytest.approx(of_student, abs=2e-4)
            assert batch["old_per_token_logps"][row][mask].tolist() == pytest.approx(of_mixture, abs=2e-4)
            lengths.add(len(tokens))
    assert len(lengths) > 2
    fresh = models.student(rollouts[1][2])  # what the second rollout would be without overlap
    rows, batch, _ = rollouts[1]
    prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
    mask = batch["completion_mask"][0].bool()
    first = batch["completion_ids"][0][mask][0]
    assert abs(float(next_log_probs(fresh, prompt)[first]) - float(batch["student_logps"][0][0])) > 1e-3


@pytest.mark.parametrize("name", ["qlora", "shared base", "qlora, shared base", "several teachers"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, model_dir, name: str):
    models = Models(tmp_path, model_dir, CASES[name])
    saved = {"save_strategy": "steps", "save_steps": 3}
    whole = models.trainer(tmp_path / "whole", **saved)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = models.trainer(tmp_path / "cut", **saved)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)
