"""Completions given by the dataset (GKD's lambda): which rows, which tokens, and the loss on them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_models import CHATML, answer, question
from conftest import build_tokenizer
from datasets import Dataset
from test_trainer import PROMPTS, make_config, make_trainer, weights
from trl.experimental.gkd import GKDTrainer

from minillm_trl import MiniLLMConfig
from minillm_trl.errors import UserError
from minillm_trl.presets import preset
from minillm_trl.training.given_completions import choose_given, given_completions

PAIRS = Dataset.from_dict(
    {"prompt": PROMPTS, "completion": [f"a cheap pub {'by the mill ' * (i % 3)}{i}" for i in range(len(PROMPTS))]}
)


def given_trainer(tmp_path: Path, lmbda: float, **options):
    return make_trainer(tmp_path, dataset=PAIRS, **{**preset("gkd", lmbda=lmbda, jsd_beta=0.3), **options})


def texts_of(batch: dict, tokenizer) -> list[str]:
    rows = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return [tokenizer.decode(ids[mask]) for ids, mask in rows]


class TestChoice:
    @pytest.mark.parametrize(("lmbda", "expected"), [(0.0, 2000), (0.3, 1400), (1.0, 0)])
    def test_share_of_given_rows_is_one_minus_lmbda(self, lmbda: float, expected: int):
        rows = [PAIRS[0]] * 2000
        chosen = choose_given(rows, lmbda, [(0, 4, 7, row + 1) for row in range(2000)], build_tokenizer())
        assert sum(ids is not None for ids in chosen) == pytest.approx(expected, abs=80)

    def test_tokens_are_those_of_the_text_with_its_end(self):
        tokenizer = build_tokenizer()
        (ids,) = choose_given([PAIRS[3]], 0.0, [(0, 1, 2)], tokenizer)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == PAIRS["completion"][3]

    def test_row_without_a_completion_is_refused_by_its_prompt(self):
        with pytest.raises(UserError, match="the punter 0"):
            choose_given([{"prompt": "the punter 0", "completion": ""}], 0.0, [(0, 1, 2)], build_tokenizer())

    def test_template_that_changes_the_prompt_is_refused_by_its_dataset(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{{ messages|length }}" + CHATML
        row = {"prompt": question("a"), "completion": answer("b")}
        with pytest.raises(UserError, match=r"^train_dataset: the chat template renders a prompt differently"):
            choose_given([row], 0.0, [(0, 1, 2)], tokenizer)

    def test_rows_of_processes_are_those_of_one_and_change_with_the_step(self):
        def given(rows: list, process: int = 0, step: int = 3, seed: int = 5) -> list:
            trainer = SimpleNamespace(
                args=SimpleNamespace(lmbda=0.5, seed=seed),
                model=SimpleNamespace(training=True),
                state=SimpleNamespace(global_step=step),
                accelerator=SimpleNamespace(process_index=process),
                _tokenizer=build_tokenizer(),
                chat_template_kwargs=None,
            )
            return given_completions(trainer, rows)

        rows = list(PAIRS)
        whole = given(rows)
        assert None in whole
        assert [each for process in range(4) for each in given(rows[8 * process :][:8], process)] == whole
        assert given(rows, step=4) != whole != given(rows, seed=6)


class TestRollouts:
    def test_half_of_a_rollout_is_given_and_the_rest_sampled(self, tmp_path: Path):
        trainer = given_trainer(tmp_path, 0.5, max_completion_length=60)
        rows = list(trainer.train_dataset)
        trainer.model.train()
        texts = texts_of(trainer._generate_and_score_completions(rows), trainer.processing_class)
        end = trainer.processing_class.eos_token
        given = [text == row["completion"] + end for text, row in zip(texts, rows, strict=True)]
        assert 8 <= sum(given) <= 24
        trainer.model.eval()
        texts = texts_of(trainer._generate_and_score_completions(rows), trainer.processing_class)
        assert not any(text == row["completion"] + end for text, row in zip(texts, rows, strict=True))

    def test_given_texts_end_at_the_limit(self, tmp_path: Path):
        trainer = given_trainer(tmp_path, 0.0, max_completion_length=5)
        trainer.model.train()
        batch = trainer._generate_and_score_completions(list(trainer.train_dataset)[:4])
        assert batch["completion_ids"].shape[1] == 5

    def test_loss_on_given_texts_is_that_of_trl_s_gkd(self, tmp_path: Path):
        trainer = given_trainer(tmp_path, 0.0, max_completion_length=60)
        trainer.model.train()
        rows = list(trainer.train_dataset)[:8]
        batch = trainer._generate_and_score_completions(rows)
        found = trainer.compute_loss(trainer.model, batch)
        tokenizer, total, tokens = trainer.processing_class, 0.0, 0
        for row in rows:
            prompt, whole = (
                tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"])
            )
            ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
            logits, teacher = (
                model(ids, attention_mask=torch.ones_like(ids)).logits[:, len(prompt) - 1 : -1]
                for model in (trainer.model, trainer.teacher_model)
            )
            labels = ids[:, len(prompt) :]
            total = total + GKDTrainer.generalized_jsd_loss(logits, teacher, labels, 0.3, num_items_in_batch=1)
            tokens += labels.numel()
        torch.testing.assert_close(found, total / tokens, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("lmbda", [0.0, 0.5])
    def test_training_on_given_texts_changes_the_weights(self, tmp_path: Path, lmbda: float):
        trainer = given_trainer(tmp_path, lmbda)
        before = weights(trainer)
        trainer.train()
        assert not torch.equal(weights(trainer), before)
        assert weights(trainer).isfinite().all()


class TestRefused:
    def test_dataset_without_completions(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"trains on the dataset.s completions"):
            make_trainer(tmp_path, **preset("gkd"))

    def test_reward_functions(self, tmp_path: Path):
        with pytest.raises(UserError, match="makes texts of its own, which excludes reward"):
            given_trainer(tmp_path, 0.5, reward_funcs=lambda completions, **unused: [0.0] * len(completions))

    def test_horizon_with_a_rollout_function(self, tmp_path: Path):
        with pytest.raises(UserError, match="horizon_start=3 has no effect with rollout_func"):
            make_trainer(tmp_path, rollout_func=lambda prompts, trainer: {}, horizon_start=3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (preset("gkd"), "lmbda=0.5 makes texts of its own, which excludes tools"),
            (preset("skd"), "skd_top_k=25 makes texts of its own, which excludes tools"),
            ({"horizon_start": 3}, "horizon_start=3 would limit each turn of a conversation with tools"),
        ],
    )
    def test_tools_whose_turns_follow_each_other(self, tmp_path: Path, options: dict, message: str):
        with pytest.raises(UserError, match=message):
            make_trainer(tmp_path, dataset=PAIRS, tools=[lambda city: city], **options)


def test_config_accepts_what_the_preset_sets(tmp_path: Path):
    config = make_config(tmp_path, **preset("gkd"))
    assert isinstance(config, MiniLLMConfig)
    assert config.lmbda == 0.5
