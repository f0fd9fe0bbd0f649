"""What comes from GRPO works with token-level advantages of a teacher: rewards, reference model, rollout functions,
tools, vLLM's correction."""

import contextlib
import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
import trl
import trl.trainer.grpo_trainer
from accelerate import Accelerator
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_trainer import DATASET, PROMPTS, make_config, make_trainer, weights
from trl import GRPOTrainer

from minillm_trl import MiniLLMTrainer
from minillm_trl.objectives import reference_kl
from minillm_trl.rollouts.buffer import sequences
from minillm_trl.training.nonfinite_rows import leave_out_faulty
from minillm_trl.training.prompt_order import mark_filler, split_columns


def first_token(completion_ids, **kwargs) -> list[float]:
    return [float(ids[0]) for ids in completion_ids]


def constant(completion_ids, **kwargs) -> list[float]:
    return [1.0] * len(completion_ids)


class TestRewardFunctions:
    def test_single_completions_are_compared_with_the_buffer(self, tmp_path):
        options = {"reward_funcs": first_token, "rkl_advantage": False, "scale_rewards": "none"}
        trainer = make_trainer(tmp_path, **options)
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:8]])
        rewards = batch["completion_ids"][:, 0].float()
        assert rewards.std() > 0
        torch.testing.assert_close(batch["advantages"][:, 0], rewards - rewards.mean())

    def test_advantage_is_added_to_the_teacher_s(self, tmp_path):
        rows = [{"prompt": prompt} for prompt in PROMPTS[:8]]
        plain, rewarded, rewards = (
            make_trainer(tmp_path, **options)._generate_and_score_completions(rows)
            for options in (
                {},
                {"reward_funcs": first_token},
                {"reward_funcs": first_token, "rkl_advantage": False},
            )
        )
        mask = plain["completion_mask"].bool()
        assert rewards["advantages"].abs().max() > 0
        total = plain["advantages"] + rewards["advantages"]
        torch.testing.assert_close(rewarded["advantages"][mask], total[mask])

    def test_weights_are_applied(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            reward_funcs=[first_token, constant],
            reward_weights=[0.0, 1.0],
            rkl_advantage=False,
        )
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:8]])
        assert batch["advantages"].abs().max() == 0

    @pytest.mark.parametrize("training", [True, False])
    def test_row_with_a_value_that_is_not_finite_is_faulty(self, tmp_path, monkeypatch, caplog, training: bool):
        trainer = make_trainer(tmp_path, reward_funcs=constant)
        trainer.model.train(training)
        add = trainer._add_reward_advantages

        def add_nan(batch, group_advantages):
            batch, faults = add(batch, group_advantages)
            batch["advantages"][1] = torch.nan
            return batch, faults

        monkeypatch.setattr(trainer, "_add_reward_advantages", add_nan)
        rows = [{"prompt": prompt} for prompt in PROMPTS[:4]]
        batch = trainer._generate_and_score_completions([*rows[:3], mark_filler(rows[3])])
        assert batch["faulty"].tolist() == [False, True, False, False]
        assert "advantages contains nan" in caplog.text
        assert batch["completion_mask"][3].sum() == 0
        assert ((batch["completion_mask"] == 0) | (batch["completion_mask"] == 1)).all()
        assert ("counts" in batch) is not training
        assert training or batch["counts"].tolist() == [True, True, True, False]

    def test_metrics_of_groups_are_left_out_where_there_are_none(self, tmp_path):
        trainer = make_trainer(tmp_path, reward_funcs=first_token, max_steps=1)
        trainer.train()
        first = trainer.state.log_history[0]
        assert {"reward", "reward_std", "rewards/first_token/mean"} <= first.keys()
        assert "frac_reward_zero_std" not in first

    def test_logged_completions_have_the_whole_advantage(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1, log_completions=True, num_completions_to_print=0)
        trainer.train()
        assert any(trainer._logs["advantages"])
        assert len(trainer._logs["advantages"]) == len(trainer._logs["completion"])

    def test_last_completions_are_shown_once(self, tmp_path, monkeypatch):
        shown = []
        printed = "trl.trainer.grpo_trainer.print_prompt_completions_sample"
        monkeypatch.setattr(printed, lambda *columns, **options: shown.append(columns[4]))
        trainer = make_trainer(tmp_path, max_steps=3, logging_steps=1, log_completions=True)
        trainer.train()
        assert shown == [1, 2, 3]
        assert trainer.log_completions  # in a further call of `train()` too
        shown.clear()
        make_trainer(tmp_path / "b", max_steps=3, logging_steps=2, log_completions=True).train()
        assert shown == [2, 3]  # those of the third step are shown by the log that ends the run
        shown.clear()
        options = {"eval_dataset": DATASET.select(range(4)), "eval_strategy": "steps", "eval_steps": 1}
        make_trainer(tmp_path / "c", max_steps=2, logging_steps=1, log_completions=True, **options).train()
        assert shown == [1, 1, 2, 2]  # of the training and of the evaluation


def test_checkpointing_s_old_names_in_trl_cause_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = make_trainer(tmp_path, max_steps=1, gradient_checkpointing=True)
        trainer.train()
    assert trainer.args.gradient_checkpointing
    renamed = hasattr(trainer.args, "activation_checkpointing")  # since transformers 5.23
    assert trainer.model.is_activation_checkpointing if renamed else trainer.model.is_gradient_checkpointing
    if renamed:
        names = {"activation_checkpointing": False, "gradient_checkpointing": True}
        assert not make_trainer(tmp_path, **names).args.gradient_checkpointing


class TestReferenceModel:
    # with one step of a rollout GRPO requests no log-probs of the policy that sampled, and the reference's come first
    @pytest.mark.parametrize(("corrected", "steps"), [(True, 2), (False, 2), (True, 1)])
    def test_loss_gains_beta_times_the_kl(self, tmp_path, model_dir, corrected: bool, steps: int):
        options = {"beta": 0.3, "teacher_mixed_alpha": 0.8, "use_bias_correction_kl": corrected}
        options |= {"steps_per_generation": steps, "num_iterations": 1}
        trainer = make_trainer(tmp_path, student=model_dir("gpt2", 0), **options)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        trainer.model.train()  # evaluation does not mix
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:4]])
        mask = batch["completion_mask"].bool()
        request = trainer._get_per_token_logps_and_entropies
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        now, _, _ = request(trainer.model, ids, attention, mask.shape[1])
        before, _, _ = request(trainer.ref_model, ids, attention, mask.shape[1])
        assert (now - before)[mask].abs().max() > 0.01
        torch.testing.assert_close(batch["ref_per_token_logps"][mask], before[mask])
        with_kl = trainer.compute_loss(trainer.model, batch)
        without = trainer.compute_loss(
            trainer.model, {name: value for name, value in batch.items() if name != "ref_per_token_logps"}
        )
        kl = reference_kl(now, before, mask)
        weighted = kl * (now - batch["old_per_token_logps"]).exp()
        assert weighted[mask].mean().item() != pytest.approx(kl[mask].mean().item(), rel=0.05)  # or the two are one
        kl = weighted if corrected else kl
        assert (with_kl - without).item() == pytest.approx(0.3 * kl[mask].mean().item(), rel=1e-3)

    def test_anchored_student_stays_nearer_to_where_it_was(self, tmp_path, model_dir):
        moved = []
        for beta in (0.0, 3.0):
            trainer = make_trainer(tmp_path, student=model_dir("gpt2", 0), beta=beta, max_steps=12, learning_rate=3e-3)
            before = weights(trainer)
            trainer.train()
            moved.append((weights(trainer) - before).norm().item())
        assert "kl" in trainer.state.log_history[0]
        assert moved[1] < 0.9 * moved[0]

    def test_reference_of_a_lora_student_is_its_base(self, tmp_path):
        trainer = make_trainer(
            tmp_path, peft_config=LoraConfig(target_modules=["c_attn"], r=4), beta=0.1, num_iterations=2
        )
        trainer.train()
        assert trainer.ref_model is None
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[-1] > 0

    def test_reference_may_follow_the_student(self, tmp_path, model_dir):
        options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
        trainer = make_trainer(tmp_path, student=model_dir("gpt2", 0), beta=0.1, **options)
        trainer.train()
        assert all(map(torch.equal, trainer.model.parameters(), trainer.ref_model.parameters()))


class TestRolloutFunction:
    def make(self, tmp_path, logps, env_mask=None, empty=(), **options):
        def rollout(prompts, trainer):
            def of_rows(values: list) -> list[list]:
                return [[] if row in empty else list(values) for row in range(len(prompts))]

            output = {
                "prompt_ids": trainer.processing_class(prompts)["input_ids"],
                "completion_ids": of_rows([8, 9, 10, 0]),
                "logprobs": None if logps is None else of_rows(logps),
            }
            return output if env_mask is None else {**output, "env_mask": of_rows(env_mask)}

        return make_trainer(tmp_path, rollout_func=rollout, **options)

    def batch(self, trainer):
        return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:2]])

    def test_its_logprobs_are_the_behavior_policy_s(self, tmp_path, caplog):
        given = [-1.0, -2.0, -0.5, -3.0]
        batch = self.batch(self.make(tmp_path, given))
        assert "teacher_mixed_alpha=0.2 is not used" in caplog.text
        torch.testing.assert_close(batch["old_per_token_logps"], torch.tensor([given, given]))

    def test_without_logprobs_its_samples_are_the_student_s(self, tmp_path):
        batch = self.batch(self.make(tmp_path, None))
        torch.testing.assert_close(batch["old_per_token_logps"], batch["student_logps"])

    @pytest.mark.parametrize("given", [[0.0] * 4, [-1.0, 2.0, -1.0, -1.0], [-1.0, None, -1.0, -1.0]])
    def test_logprobs_that_are_none_are_refused(self, tmp_path, given: list):
        with pytest.raises(ValueError, match="rollout_func returned logprobs from"):
            self.batch(self.make(tmp_path, given))

    def test_logprobs_of_masked_tokens_may_be_anything(self, tmp_path):
        trainer = self.make(tmp_path, [-1.0, 5.0, 5.0, -3.0], env_mask=[1, 0, 0, 1])
        found = self.batch(trainer)["old_per_token_logps"]
        torch.testing.assert_close(found[:, [0, 3]], torch.tensor([[-1.0, -3.0]] * 2))

    def test_weight_that_overflows_is_reported_with_the_cap_to_set(self, tmp_path, caplog):
        given, options = [-200.0] * 4, {"importance_weighting": "sequence"}
        assert self.batch(self.make(tmp_path, given, **options))["faulty"].all()
        assert "has overflowed (set importance_weight_cap" in caplog.text
        batch = self.batch(self.make(tmp_path, given, **options, importance_weight_cap=3.0))
        assert (batch["long_term_weights"] == 3.0).all()

    def test_masked_tokens_are_in_neither_term(self, tmp_path):
        masked = self.make(tmp_path, None, env_mask=[1, 0, 0, 1])
        batch = self.batch(masked)
        rewards = self.batch(self.make(tmp_path, None, gamma=0.0, include_current_reward=True))["advantages"]
        expected = torch.zeros_like(rewards)
        expected[:, 0] = rewards[:, 3]  # of the future of the first token, the last alone counts
        torch.testing.assert_close(batch["advantages"], expected)
        unmasked = {name: value for name, value in batch.items() if name != "tool_mask"}
        with torch.no_grad():
            loss = masked.compute_loss(masked.model, batch).item()
            assert masked.compute_loss(masked.model, unmasked).item() != pytest.approx(loss, rel=1e-3)
            # the masked tokens' own scores do not matter, but they are attended to
            noise = {**batch, "teacher_hidden_states": batch["teacher_hidden_states"].clone()}
            noise["teacher_hidden_states"][:, 1:3] = 99.0
            assert masked.compute_loss(masked.model, noise).item() == loss
            other = {**batch, "completion_ids": torch.tensor([[8, 30, 31, 0]] * 2)}
            assert masked.compute_loss(masked.model, other).item() != loss

    @pytest.mark.parametrize(("given", "env_mask"), [(None, None), ([-1.0, -2.0, -0.5, -3.0], [1, 0, 1, 1])])
    def test_empty_completion_leaves_the_others_as_they_are(self, tmp_path, given, env_mask):
        options = {"steps_per_generation": 1, "max_steps": 1, "loss_reduction": "token_mean"}
        one_empty = self.make(tmp_path, given, env_mask, empty=(1, 2), **options)
        none_empty = self.make(tmp_path, given, env_mask, **options)
        batch, whole = (
            trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:4]])
            for trainer in (one_empty, none_empty)
        )
        assert batch["completion_mask"].sum(dim=1).tolist() == [4, 0, 0, 4]
        mask = sequences(batch)[2]
        for name in ("advantages", "old_per_token_logps", "student_logps"):
            torch.testing.assert_close(batch[name][mask], whole[name][mask])
        one_empty.train()
        logged = one_empty.state.log_history[0]
        assert logged["completions/min_length"] == 0
        assert logged["rollout/eos_rate"] == 0.5  # an empty one has no end token
        assert logged["grad_norm"] > 0

    def test_rollout_of_empty_completions_alone_moves_nothing(self, tmp_path):
        trainer = self.make(tmp_path, None, empty=range(8), max_steps=1, optim="sgd")
        before = weights(trainer)
        trainer.train()
        assert torch.equal(weights(trainer), before)
        assert trainer.state.log_history[0]["loss"] == 0.0

    def test_token_outside_the_shared_vocabulary_is_refused(self, tmp_path):
        trainer = self.make(tmp_path, None, teacher=build_model("gpt2", 300, 1))
        trainer.scoring.scorer = dataclasses.replace(trainer.scoring.scorer, vocab_size=10)
        with pytest.raises(ValueError, match="has the token 10, but student and teacher share only tokens 0 to 9"):
            self.batch(trainer)


def weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


class ScriptedFirstTurn(MiniLLMTrainer):
    """Every other prompt calls the tool in its first turn; what follows is sampled."""

    CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = self._rollout.turn == 0
        completions, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if first:
            call = self._tokenizer(self.CALL)["input_ids"]
            completions = [call if i % 2 == 0 else each for i, each in enumerate(completions)]
        return completions, logps


class Town:
    """An environment that asks for its weather and rewards whoever looked."""

    def reset(self, **kwargs) -> str:
        self.asked = 0
        return " in Rome"

    def weather(self, city: str) -> str:
        """Weather of a city.

        Args:
            city: its name.
        """
        self.asked += 1
        return f"sunny in {city}"

    def get_reward(self) -> float:
        return float(self.asked)


class TestTools:
    def make(self, tmp_path, **options) -> ScriptedFirstTurn:
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
        models = [build_model("llama", len(tokenizer), seed) for seed in (0, 1)]
        for model in models:
            model.config.max_position_embeddings = 1024
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        conversations = [[{"role": "user", "content": f"weather {i}"}] for i in range(8)]
        return ScriptedFirstTurn(
            *models,
            args=make_config(tmp_path, max_completion_length=200, max_steps=2),
            processing_class=tokenizer,
            **{"train_dataset": Dataset.from_dict({"prompt": conversations}), **options},
        )

    def test_answers_of_tools_are_attended_to_but_not_trained(self, tmp_path):
        trainer = self.make(tmp_path, tools=[weather])
        trainer.train()
        assert trainer.state.log_history[0]["tools/call_frequency"] == 0.5
        answered = 0
        for batch in trainer.buffer.batches:
            for ids, model_made in zip(batch["completion_ids"], batch["tool_mask"], strict=True):
                if (model_made == 0).any():
                    answered += 1
                    assert "sunny in Rome" in trainer._tokenizer.decode(ids[model_made == 0])
            assert (batch["advantages"][batch["tool_mask"] == 0] == 0).all()
            assert batch["window_tokens"] == (batch["completion_mask"] * batch["tool_mask"]).sum()
        assert answered == 4

    def test_environment_brings_its_tools_and_its_reward(self, tmp_path):
        trainer = self.make(tmp_path, environment_factory=Town)
        assert trainer.reward_func_names == ["Town"]
        trainer.train()
        assert trainer.state.log_history[0]["rewards/Town/mean"] == 0.5
        for batch in trainer.buffer.batches:
            prompts = trainer._tokenizer.batch_decode(batch["prompt_ids"])
            assert all(" in Rome" in prompt for prompt in prompts)

    def test_environment_may_bring_the_prompts(self, tmp_path):
        trainer = self.make(tmp_path, environment_factory=Town, train_dataset=None)
        trainer.train()
        for batch in trainer.buffer.batches:
            assert all(" in Rome" in prompt for prompt in trainer._tokenizer.batch_decode(batch["prompt_ids"]))


class FakeVLLM:
    """Answers as vLLM does, from fixed tokens, with log-probs that differ a little from the student's."""

    def __init__(self, model, **kwargs):
        self.model = model
        self.synchronised = 0
        self.generation_kwargs = {}
        self.asked = []

    def sync_weights(self):
        self.synchronised += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        self.asked.append((images, num_generations))
        with profiler or contextlib.nullcontext():
            completions = [[8, 9, 10, 0][i % 2 :] for i in range(len(prompts))]
        logps = []
        for prompt, completion in zip(prompts, completions, strict=True):
            with torch.no_grad():
                rows = torch.log_softmax(self.model(torch.tensor([prompt + completion])).logits[0], dim=-1)
            first = len(prompt) - 1
            logps.append([[rows[first + t, token].item() - 0.1 * (t + 1)] for t, token in enumerate(completion)])
        return prompts, completions, logps, None


class TestVLLM:
    OPTIONS = {"use_vllm": True, "teacher_mixed_alpha": 0.0, "vllm_importance_sampling_clip_max": 100.0}  # noqa: RUF012

    def make(self, tmp_path, monkeypatch, **options):
        monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", FakeVLLM)
        return make_trainer(tmp_path, family="llama", **{**self.OPTIONS, **options})

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [("token_truncate", [0.1, 0.2, 0.3, 0.4]), ("sequence_mask", [1.0] * 4)],
    )
    def test_correction_multiplies_the_long_term_of_each_token(self, tmp_path, monkeypatch, mode: str, expected: list):
        trainer = self.make(tmp_path, monkeypatch, vllm_importance_sampling_mode=mode, single_step_decomposition=False)
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:4]])
        row = 0  # four tokens; the log-ratios add up to 1
        ratio = batch["importance_sampling_ratio"][row].expand(4)
        torch.testing.assert_close(ratio.log(), torch.tensor(expected), rtol=1e-3, atol=1e-3)
        batch = {name: value[: row + 1] for name, value in batch.items()}
        torch.testing.assert_close(batch["old_per_token_logps"], batch["student_logps"])
        loss = trainer.compute_loss(trainer.model, batch)
        assert loss.item() == pytest.approx(-(ratio * batch["advantages"][0]).mean().item(), rel=1e-4)

    def test_log_probs_of_a_rollout_function_are_corrected_once(self, tmp_path, monkeypatch):
        given = [-1.0, -2.0, -0.5, -3.0]

        def rollout(prompts, trainer):
            ids = trainer.processing_class(prompts)["input_ids"]
            return {
                "prompt_ids": ids,
                "completion_ids": [[8, 9, 10, 0]] * len(ids),
                "logprobs": [list(given) for _ in ids],
            }

        options = {"vllm_importance_sampling_clip_max": 1e9, "vllm_importance_sampling_mode": "token_truncate"}
        trainer = self.make(tmp_path, monkeypatch, rollout_func=rollout, **options)
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:2]])
        torch.testing.assert_close(batch["old_per_token_logps"], batch["student_logps"])
        expected = batch["student_logps"] - torch.tensor([given] * 2)
        torch.testing.assert_close(batch["importance_sampling_ratio"].log(), expected, rtol=1e-3, atol=1e-3)

    def test_training_synchronises_the_weights_once_a_rollout(self, tmp_path, monkeypatch):
        trainer = self.make(tmp_path, monkeypatch, num_iterations=2, max_steps=8)
        trainer.train()
        assert trainer.vllm_generation.synchronised == 2
        assert trainer.vllm_generation.asked == [(None, 1)] * 2
        assert "sampling/importance_sampling_ratio/mean" in trainer.state.log_history[0]

    def test_mixing_is_refused_with_what_to_do(self, tmp_path):
        with pytest.raises(ValueError, match=r"Set mixing='speculative', or teacher_mixed_alpha=0.0"):
            make_trainer(tmp_path, use_vllm=True)


def test_evaluation_dataset_may_be_a_dict(tmp_path):
    splits = {"first": DATASET.select(range(4)), "second": DATASET.select(range(4, 8))}
    trainer = make_trainer(tmp_path, eval_dataset=splits, eval_strategy="steps", eval_steps=4)
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"eval_first_rouge_l", "eval_second_rouge_l"} <= logged


@pytest.mark.parametrize(("options", "rows"), [({}, 8), ({"is_training": False}, 8), ({"is_training": True}, 7)])
def test_evaluation_on_several_processes_is_filled_up(tmp_path, monkeypatch, options: dict, rows: int):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    loader = trainer._get_dataloader(DATASET.select(range(7)), "Evaluation", 4, **options)
    assert len(loader.dataset) == rows
    fillers = [not is_real for is_real in split_columns(list(loader.dataset))[1]]
    assert fillers == [False] * 7 + [True] * (rows - 7)


def test_loader_of_the_data_is_made_as_transformers_asks(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    given = ([1, 2], "Training", 4, "sampler", True, "key")
    monkeypatch.setattr(GRPOTrainer, "_get_dataloader", lambda self, *arguments: arguments)
    assert trainer._get_dataloader(*given) == given


def test_reverse_kl_is_logged_whatever_divergence_is_trained(tmp_path):
    data, found = DATASET.select(range(4)), []
    for options in ({}, {"single_step_divergence": "forward_kl"}):
        found.append(make_trainer(tmp_path, eval_dataset=data, **options).evaluate())
    assert found[0]["eval_objective/single_step"] != pytest.approx(found[1]["eval_objective/single_step"], rel=1e-3)
    assert found[0]["eval_objective/reverse_kl"] == pytest.approx(found[1]["eval_objective/reverse_kl"], rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_micro_batch_of_faulty_rows_and_a_loss_that_is_not_finite_are_explained_in_training(tmp_path, training: bool):
    trainer = make_trainer(tmp_path)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:4]])
    trainer.model.train(training)
    faulty = leave_out_faulty({**batch, "faulty": torch.ones(4, dtype=torch.bool)})
    trainer.compute_loss(trainer.model, {**faulty, "window_tokens": torch.tensor(0.0)})
    assert bool(trainer.guard.faults) is training
    for advantage in (torch.nan, 3e38):  # the sum of the second overflows
        trainer.guard.faults.clear()
        trainer.compute_loss(trainer.model, {**batch, "advantages": torch.full_like(batch["advantages"], advantage)})
        assert bool(trainer.guard.faults) is training


def test_row_that_is_left_out_does_not_go_through_the_student(tmp_path):
    """A NaN in the forward pass would give a NaN gradient even with weight 0."""
    trainer = make_trainer(tmp_path, family="llama")
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:2]])
    trainer.model.train()
    batch["prompt_ids"][1] = 299
    trainer.model.model.embed_tokens.weight.data[299] = torch.nan
    trainer.compute_loss(trainer.model, leave_out_faulty({**batch, "faulty": torch.tensor([False, True])})).backward()
    assert all(parameter.grad.isfinite().all() for parameter in trainer.model.parameters())
