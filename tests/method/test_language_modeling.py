"""The corpus of L_PT: which tokens count, which examples a step sees, and what they add to the loss."""

import re
from collections import Counter

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset, IterableDataset

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.training.language_modeling import LanguageModelingBatches, encode_corpus

TOKENIZER = build_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def pairs(count: int) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"the mill {i}" for i in range(count)], "completion": [f" is cheap {i}" for i in range(count)]}
    )


def stream(dataset: Dataset) -> IterableDataset:
    return dataset.to_iterable_dataset(num_shards=1)


def batches(dataset, batch_size: int = 2, seed: int = 0, max_length: int = 16) -> LanguageModelingBatches:
    return LanguageModelingBatches(dataset, TOKENIZER, max_length=max_length, batch_size=batch_size, seed=seed)


def examples(window: list[dict]) -> list[tuple]:
    """The sequences of a window without their padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in window
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


class TestEncoding:
    def test_texts_are_joined_by_end_of_sequence_and_cut_into_blocks(self):
        texts = ["the mill", "a cheap pub in the city centre", "river"]
        rows = encode_corpus(Dataset.from_dict({"text": texts}), TOKENIZER, 5, {})
        joined = [token for text in texts for token in [*TOKENIZER(text)["input_ids"], EOS]]
        assert [token for row in rows for token in row["input_ids"]] == joined
        assert [len(row["input_ids"]) for row in rows][:-1] == [5] * (len(rows) - 1)
        assert all(all(row["counts"]) for row in rows)

    def test_loss_of_a_pair_is_on_its_completion_and_end_of_sequence(self):
        (row,) = encode_corpus(
            Dataset.from_dict({"prompt": ["the mill"], "completion": [" is cheap"]}), TOKENIZER, 64, {}
        )
        counted = [token for token, counts in zip(row["input_ids"], row["counts"], strict=True) if counts]
        assert counted == [*TOKENIZER(" is cheap")["input_ids"], EOS]
        assert row["input_ids"][: -len(counted)] == TOKENIZER("the mill")["input_ids"]

    def test_prompt_keeps_the_tokens_that_sampling_starts_from(self):
        prompt, completion = "the m", "ill is cheap"  # "mill" is one token across the border
        (row,) = encode_corpus(Dataset.from_dict({"prompt": [prompt], "completion": [completion]}), TOKENIZER, 64, {})
        ids = TOKENIZER(prompt)["input_ids"]
        assert TOKENIZER(prompt + completion)["input_ids"][: len(ids)] != ids
        assert row["input_ids"] == [*ids, *TOKENIZER(completion)["input_ids"], EOS]

    def test_loss_of_a_conversation_is_on_the_answer(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = TEMPLATE
        rows = {
            "prompt": [[{"role": "user", "content": "the mill"}]],
            "completion": [[{"role": "assistant", "content": "is cheap"}]],
        }
        (row,) = encode_corpus(Dataset.from_dict(rows), tokenizer, 64, {})
        counted = [token for token, counts in zip(row["input_ids"], row["counts"], strict=True) if counts]
        assert tokenizer.decode(counted) == "is cheap<eos>"

    def test_pairs_whose_prompt_fills_the_length_are_dropped(self, caplog: pytest.LogCaptureFixture):
        rows = {"prompt": ["the mill " * 20, "the"], "completion": ["a", "b"]}
        assert len(encode_corpus(Dataset.from_dict(rows), TOKENIZER, 8, {})) == 1
        assert "1 of 2 rows of lm_dataset were dropped" in caplog.text

    @pytest.mark.parametrize("make", [lambda dataset: dataset, stream], ids=["dataset", "stream"])
    def test_pair_with_both_sides_empty_is_dropped(self, make):
        rows = make(Dataset.from_dict({"prompt": ["", "the mill"], "completion": ["", " is cheap"]}))
        assert len(list(encode_corpus(rows, TOKENIZER, 64, {}))) == 1

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("prompt", None), ("completion", None), ("completion", []), ("prompt", []), ("text", None)),
            *(("prompt", 5), ("prompt", {"role": "user", "content": "a"}), ("text", 5)),
            ("text", [{"role": "user", "content": "a"}]),
        ],
    )
    def test_row_without_a_text_is_refused_by_number_and_field(self, name: str, value):
        good = [{"role": "user", "content": "a"}] if isinstance(value, list) else "a"
        columns = ["text"] if name == "text" else ["prompt", "completion"]
        rows = Dataset.from_dict({each: [value if each == name else good] for each in columns})
        expected = "a text" if name == "text" else "a text or a conversation of at least one message"
        with pytest.raises(
            ValueError, match=rf"lm_dataset: row 0: {name} is {re.escape(str(value))}, expected {expected}\."
        ):
            encode_corpus(rows, TOKENIZER, 64, {})

    @pytest.mark.parametrize(
        "rows", [{"prompt": ["the mill " * 20], "completion": ["a"]}, {"text": []}, {"prompt": [], "completion": []}]
    )
    def test_corpus_without_a_token_to_learn_is_refused(self, rows: dict):
        with pytest.raises(ValueError, match="no row with a token to learn within lm_max_length=8"):
            encode_corpus(Dataset.from_dict(rows), TOKENIZER, 8, {})


class TestOrder:
    @pytest.mark.parametrize("make", [lambda d: d, stream], ids=["dataset", "stream"])
    def test_window_does_not_depend_on_processes_or_micro_batches(self, make):
        whole = examples(batches(make(pairs(30)), batch_size=8).window(2, 1, 0, 1))
        for batch_size, accumulation, processes in ((2, 4, 1), (2, 2, 2), (4, 1, 2)):
            parts = [
                each
                for process in range(processes)
                for each in examples(batches(make(pairs(30)), batch_size).window(2, accumulation, process, processes))
            ]
            assert Counter(parts) == Counter(whole)

    @pytest.mark.parametrize("make", [lambda d: d, stream], ids=["dataset", "stream"])
    def test_window_does_not_depend_on_what_was_read_before(self, make):
        read_on = batches(make(pairs(7)), batch_size=3)
        windows = [examples(read_on.window(step, 1, 0, 1)) for step in range(6)]
        for step in (5, 2):
            assert examples(batches(make(pairs(7)), batch_size=3).window(step, 1, 0, 1)) == windows[step]
        assert examples(read_on.window(1, 1, 0, 1)) == windows[1]  # back again

    def test_every_epoch_is_a_permutation_of_its_own(self):
        source = batches(pairs(6), batch_size=6)
        first, second = (examples(source.window(step, 1, 0, 1)) for step in (0, 1))
        assert Counter(first) == Counter(second)
        assert len(set(first)) == 6
        assert first != second
        assert examples(batches(pairs(6), batch_size=6, seed=1).window(0, 1, 0, 1)) != first

    def test_stream_is_read_in_its_order_and_begun_again(self):
        source = batches(stream(pairs(3)), batch_size=4)
        ids = [tuple(row["input_ids"]) for row in encode_corpus(pairs(3), TOKENIZER, 16, {})]
        assert examples(source.window(0, 1, 0, 1)) == [*ids, ids[0]]

    def test_shuffled_stream_is_shuffled_anew_in_every_epoch(self):
        def source() -> LanguageModelingBatches:
            return batches(stream(pairs(6)).shuffle(seed=0, buffer_size=6), batch_size=6)

        first, second = (examples(source().window(step, 1, 0, 1)) for step in (0, 1))
        assert Counter(first) == Counter(second)
        assert first != second

    def test_empty_stream_is_refused_and_does_not_hang(self):
        empty = stream(Dataset.from_dict({"prompt": ["the mill " * 20], "completion": ["a"]}))
        with pytest.raises(ValueError, match="lm_dataset yields no row"):
            batches(empty, max_length=8).window(0, 1, 0, 1)

    def test_padding_is_neither_attended_to_nor_counted(self):
        rows = Dataset.from_dict({"prompt": ["the", "the"], "completion": [" mill is cheap", " mill"]})
        (batch,) = batches(rows).window(0, 1, 0, 1)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
        assert not batch["loss_mask"][batch["attention_mask"][:, 1:] == 0].any()


class TestLoss:
    def trainer(self, tmp_path, **options) -> MiniLLMTrainer:
        args = MiniLLMConfig(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_steps=1,
            **{
                "per_device_train_batch_size": 4,
                "max_completion_length": 8,
                "max_steps": 2,
                "save_strategy": "no",
                **options,
            },
        )
        return MiniLLMTrainer(
            build_model("gpt2", len(TOKENIZER)),
            build_model("gpt2", len(TOKENIZER), 1, width=48),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [f"the mill {i}" for i in range(16)]}),
            processing_class=TOKENIZER,
            lm_dataset=pairs(12),
        )

    @pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
    def test_value_is_the_mean_over_the_corpus_tokens_times_the_coefficient(self, tmp_path, kd_ratio: float):
        trainer = self.trainer(tmp_path, lm_coef=0.7, lm_kd_ratio=kd_ratio)
        prompts = torch.tensor([[5, 6]])
        rollouts = trainer.score_rollouts(prompts, torch.ones_like(prompts), prompts, torch.ones_like(prompts))
        (lm,) = trainer._lm_batches.load_window(0, 1, trainer.accelerator)
        actual = trainer.compute_loss(trainer.model, {**rollouts, "lm": lm})
        without = trainer.compute_loss(trainer.model, rollouts)

        total, count = 0.0, 0
        for ids, attention, counts in zip(lm["input_ids"], lm["attention_mask"], lm["loss_mask"], strict=True):
            ids = ids[attention.bool()][None]
            log_q, log_p = (
                torch.log_softmax(model(ids).logits[0], -1) for model in (trainer.model, trainer.teacher_model)
            )
            for t in range(ids.shape[1] - 1):
                if counts[t]:
                    kl = (log_p[t].exp() * (log_p[t] - log_q[t])).sum()
                    total = total - (1 - kd_ratio) * log_q[t, ids[0, t + 1]] + kd_ratio * kl
                    count += 1
        assert (actual - without).item() == pytest.approx(0.7 * total.item() / count, rel=1e-4)

    def test_run_logs_both_parts(self, tmp_path):
        trainer = self.trainer(tmp_path, lm_kd_ratio=0.5)
        trainer.train()
        first = trainer.state.log_history[0]
        parts = first["objective/long_term"] + first["objective/single_step"]
        corpus = 0.5 * first["objective/lm_cross_entropy"] + 0.5 * first["objective/lm_forward_kl"]
        assert first["loss"] == pytest.approx(parts + corpus, abs=2e-4)

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_each_micro_batch_has_rows_of_its_own(self, tmp_path, monkeypatch: pytest.MonkeyPatch, accumulation: int):
        """Three optimizer steps read the corpus of 12 pairs once, in whatever micro-batches."""
        options = {"gradient_accumulation_steps": accumulation, "lm_batch_size": 4 // accumulation, "max_steps": 6}
        trainer = self.trainer(tmp_path, **options)
        seen, compute_loss = [], trainer._compute_loss
        monkeypatch.setattr(
            trainer, "_compute_loss", lambda model, inputs: (seen.append(inputs["lm"]), compute_loss(model, inputs))[1]
        )
        trainer.train()
        passes = examples(seen[: 3 * accumulation]), examples(seen[3 * accumulation :])
        assert [len(set(rows)) for rows in passes] == [12, 12]
        assert set(passes[0]) == set(passes[1])

    def test_student_learns_the_corpus(self, tmp_path):
        trainer = self.trainer(tmp_path, max_steps=40, learning_rate=3e-3, lm_batch_size=12)
        trainer.train()
        losses = [entry["objective/lm_cross_entropy"] for entry in trainer.state.log_history if "entropy" in entry]
        assert losses[-1] < 0.5 * losses[0]

    def test_resumed_run_goes_on_with_the_corpus(self, tmp_path):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        whole = self.trainer(tmp_path, **options)
        whole.train()
        resumed = self.trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        pairs_of_weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs_of_weights)
