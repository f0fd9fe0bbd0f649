"""Batches of the corpus of L_PT: exact values, counts of tokens over processes, and what is read of a stream."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model, build_tokenizer
from datasets import Dataset, IterableDataset

from minillm_trl.errors import UserError
from minillm_trl.objectives import forward_kl
from minillm_trl.rollouts.keyed_random import keyed_uniforms
from minillm_trl.training.language_modeling import (
    LanguageModelingBatches,
    encode_corpus,
    language_modeling_request,
    lm_batches,
)

TOKENIZER = build_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
# An answer begins with the letters that the template's argument chooses
TEMPLATE = "{% set start = 'ab' if thinks else 'cd' %}{% for m in messages %}{{ start if m.role == 'assistant' }}{{ m.content }}<eos>{% endfor %}{{ start if add_generation_prompt }}"  # noqa: E501


def letters(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def pairs(count: int) -> Dataset:
    """Prompts of a letter, and completions of one to three letters; row i has the letter i."""
    letter = [chr(ord("A") + row) for row in range(count)]
    return Dataset.from_dict(
        {"prompt": letter, "completion": [each * (row % 3 + 1) for row, each in enumerate(letter)]}
    )


def batches(dataset, **options) -> LanguageModelingBatches:
    return LanguageModelingBatches(dataset, TOKENIZER, **{"max_length": 16, "batch_size": 2, "seed": 3, **options})


def rows_of(window: list[dict[str, torch.Tensor]]) -> list[int]:
    """The numbers of the rows of `pairs` in a window."""
    first = [int(ids[0]) for batch in window for ids in batch["input_ids"]]
    return [letters("ABCDEFGHIJ").index(id_) for id_ in first]


class TestRows:
    def test_row_is_kept_if_any_token_is_learnt(self):
        """The first token is predicted from nothing, so a block of one token teaches nothing."""
        kept = encode_corpus(Dataset.from_dict({"text": ["A"]}), TOKENIZER, 2, {})
        assert [row["input_ids"] for row in kept] == [[*letters("A"), EOS]]
        cut = encode_corpus(Dataset.from_dict({"text": ["AB"]}), TOKENIZER, 2, {})
        assert [row["input_ids"] for row in cut] == [letters("AB")]
        pair = encode_corpus(Dataset.from_dict({"prompt": ["A"], "completion": [""]}), TOKENIZER, 2, {})
        assert [(row["input_ids"], row["counts"]) for row in pair] == [([*letters("A"), EOS], [False, True])]
        for length, counts in ((4, [False, False, True, True]), (3, [False, False, True])):
            (row,) = encode_corpus(Dataset.from_dict({"prompt": ["AB"], "completion": ["CDE"]}), TOKENIZER, length, {})
            assert (row["input_ids"], row["counts"]) == (letters("ABCDE")[:length], counts)

    def test_template_arguments_reach_the_prompt(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = TEMPLATE
        rows = Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": "A"}]],
                "completion": [[{"role": "assistant", "content": "B"}]],
            }
        )
        options = {"max_length": 16, "batch_size": 1, "seed": 0}
        for kwargs, start in ((None, "cd"), ({"thinks": True}, "ab")):
            made = LanguageModelingBatches(rows, tokenizer, **options, chat_template_kwargs=kwargs)
            assert made.rows[0]["input_ids"][:4] == [*letters("A"), EOS, *letters(start)]

    def test_template_that_renders_the_prompt_otherwise_before_its_answer_is_refused(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'ab' if add_generation_prompt }}"
        )
        rows = {
            "prompt": [[{"role": "user", "content": "A"}]],
            "completion": [[{"role": "assistant", "content": "B"}]],
        }
        with pytest.raises(UserError, match=r"^lm_dataset: the chat template"):
            encode_corpus(Dataset.from_dict(rows), tokenizer, 16, {})

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            (
                {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
                "row 0: prompt and completion are",
            ),
            ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "row 0: prompt and completion are"),
            ({"prompt": "a"}, r"has the columns \['prompt'\]"),
            ({"completion": "a"}, r"has the columns \['completion'\]"),
            ({"words": "a"}, r"has the columns \['words'\]"),
        ],
    )
    def test_corpus_of_another_form_is_refused(self, row: dict, words: str):
        with pytest.raises(UserError, match=words):
            encode_corpus(Dataset.from_list([row]), TOKENIZER, 16, {})
        with pytest.raises(UserError, match=words):
            next(iter(encode_corpus(IterableDataset.from_generator(lambda: iter([row])), TOKENIZER, 16, {})))

    def test_stream_without_names_of_columns_is_read(self):
        found = encode_corpus(IterableDataset.from_generator(lambda: iter([{"text": "AB"}])), TOKENIZER, 16, {})
        assert [row["input_ids"] for row in found] == [[*letters("AB"), EOS]]

    @pytest.mark.parametrize("length", [3, 16])
    def test_rows_that_are_dropped_are_counted(self, caplog, length: int):
        rows = Dataset.from_dict({"prompt": ["ABCD", "A", "ABCDE"], "completion": ["E", "B", "F"]})
        assert len(encode_corpus(rows, TOKENIZER, length, {})) == (1 if length == 3 else 3)
        assert [record.getMessage()[:39] for record in caplog.records] == (
            ["2 of 3 rows of lm_dataset were dropped:"] if length == 3 else []
        )


class TestWindows:
    def test_values_of_a_micro_batch(self):
        made = batches(pairs(3), batch_size=3)
        (batch,) = made.window(0, 1, 0, 1)
        for row, number in enumerate(rows_of([batch])):
            size = number % 3 + 1
            ids = letters(chr(ord("A") + number) * (size + 1))
            assert batch["input_ids"][row].tolist() == [*ids, EOS, *[PAD] * (3 - size)]
            assert batch["attention_mask"][row].tolist() == [1] * (size + 2) + [0] * (3 - size)
            assert batch["loss_mask"][row].tolist() == [True] * (size + 1) + [False] * (3 - size)
        assert (batch["attention_mask"].dtype, batch["loss_mask"].dtype) == (torch.int64, torch.bool)

    def test_steps_read_each_epoch_in_the_order_of_its_key(self):
        expected = [row for epoch in range(5) for row in keyed_uniforms(7, 3, epoch).argsort().tolist()]
        made = batches(pairs(7))
        for step in (0, 1, 2, 3, 4, 1, 0):
            assert rows_of(made.window(step, 3, 0, 1)) == expected[6 * step :][:6]
        parts = [rows_of(made.window(1, 2, process, 3)) for process in range(3)]
        assert parts == [expected[12 + 4 * process :][:4] for process in range(3)]

    def test_stream_is_read_once_as_long_as_steps_follow_each_other(self):
        read = []

        def generate():
            for row in pairs(7):
                read.append(row["prompt"])
                yield row

        made = batches(IterableDataset.from_generator(generate))
        before = len(read)  # for the names of the columns
        windows = [rows_of(made.window(step, 2, 0, 1)) for step in range(5)]
        assert windows == [[number % 7 for number in range(4 * step, 4 * step + 4)] for step in range(5)]
        assert len(read) - before <= 22
        assert rows_of(made.window(4, 2, 0, 1)) == windows[4]
        assert rows_of(made.window(0, 2, 0, 1)) == windows[0]
        assert rows_of(made.window(2, 1, 1, 2)) == [3, 4]  # after 8 rows, and two of the other process

    def test_epochs_of_a_shuffled_stream_are_those_of_its_shuffle(self):
        stream = pairs(6).to_iterable_dataset().shuffle(seed=0, buffer_size=6)
        expected = []
        for epoch in range(3):
            stream.set_epoch(epoch)
            expected.append([ord(row["prompt"]) - ord("A") for row in stream])
        made = batches(pairs(6).to_iterable_dataset().shuffle(seed=0, buffer_size=6), batch_size=6)
        assert [rows_of(made.window(step, 1, 0, 1)) for step in range(3)] == expected

    def test_tokens_of_a_step_are_counted_over_micro_batches_and_processes(self):
        made = batches(pairs(9))
        windows = [made.window(1, 2, process, 2) for process in range(2)]
        counts = [sum(int(batch["loss_mask"].sum()) for batch in window) for window in windows]
        assert counts[0] != counts[1]
        for process in range(2):
            reduced = []

            def reduce(own: torch.Tensor, reduction: str, reduced: list = reduced) -> torch.Tensor:
                reduced.append((int(own), reduction))
                return torch.tensor(sum(counts))

            parts = {"process_index": process, "num_processes": 2, "device": torch.device("cpu"), "reduce": reduce}
            loaded = made.load_window(1, 2, SimpleNamespace(**parts))
            assert reduced == [(counts[process], "sum")]
            assert [int(batch["window_tokens"]) for batch in loaded] == [sum(counts)] * 2
            for batch, expected in zip(loaded, windows[process], strict=True):
                assert all(torch.equal(batch[name], values) for name, values in expected.items())

    @pytest.mark.parametrize("step", [0, 1, 2, 3])
    @pytest.mark.parametrize("streams", [False, True])
    def test_run_may_resume_at_any_step(self, step: int, streams: bool):
        """Steps of six rows; an epoch has seven, in a random order or in that of a stream."""
        made, accelerator = batches(pairs(7).to_iterable_dataset() if streams else pairs(7)), Accelerator(cpu=True)
        orders = [range(7) if streams else keyed_uniforms(7, 3, epoch).argsort().tolist() for epoch in range(4)]
        found = rows_of([made.load(step, micro_step, 3, accelerator) for micro_step in range(3)])
        assert found == [row for order in orders for row in order][6 * step :][:6]

    def test_window_is_on_the_device_of_the_process(self):
        parts = {"process_index": 0, "num_processes": 1, "device": torch.device("meta")}
        accelerator = SimpleNamespace(**parts, reduce=lambda own, reduction: own)
        for batch in batches(pairs(4)).load_window(0, 2, accelerator):
            assert all(values.is_meta for values in batch.values())

    def test_window_of_a_step_is_loaded_once(self):
        made, accelerator = batches(pairs(9)), Accelerator(cpu=True)
        first = [made.load(0, micro_step, 2, accelerator) for micro_step in (0, 1, 0)]
        assert first[0] is first[2]
        assert [rows_of([batch]) for batch in first[:2]] == [rows_of([batch]) for batch in made.window(0, 2, 0, 1)]
        other = [made.load(1, micro_step, 2, accelerator) for micro_step in range(2)]
        assert rows_of(other) == rows_of(made.window(1, 2, 0, 1))
        assert rows_of([made.load(0, 1, 2, accelerator)]) == rows_of([first[1]])


@pytest.mark.parametrize(("limit", "context", "length"), [(6, None, 6), (6, 4, 4), (4, 6, 4), (4, 4, 4)])
@pytest.mark.parametrize(("lm_batch_size", "size"), [(None, 2), (3, 3)])
def test_corpus_fits_into_the_context_and_has_micro_batches_of_its_own(
    limit: int, context: int | None, length: int, lm_batch_size: int | None, size: int
):
    args = SimpleNamespace(lm_max_length=limit, lm_batch_size=lm_batch_size, per_device_train_batch_size=2, seed=5)
    found = lm_batches(Dataset.from_dict({"text": ["ABCDEFGHIJ" * 3]}), args, TOKENIZER, context, None)
    assert max(len(row["input_ids"]) for row in found.rows) == length
    assert (found.batch_size, found.seed) == (size, 5)
    assert lm_batches(None, args, TOKENIZER, context, None) is None


def test_corpus_of_a_run_has_its_template_arguments():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = {"prompt": [[{"role": "user", "content": "A"}]], "completion": [[{"role": "assistant", "content": "B"}]]}
    args = SimpleNamespace(lm_max_length=16, lm_batch_size=1, per_device_train_batch_size=1, seed=5)
    found = lm_batches(Dataset.from_dict(rows), args, tokenizer, None, {"thinks": True})
    assert found.rows[0]["input_ids"][2:4] == letters("ab")


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3])
def test_teacher_runs_for_its_share_of_the_loss_alone(kd_ratio: float):
    (batch,) = batches(pairs(2)).window(0, 1, 0, 1)
    teacher = build_model("gpt2", len(TOKENIZER)) if kd_ratio else None
    request = language_modeling_request(batch, teacher, kd_ratio)
    for field, name in (
        ("input_ids", "input_ids"),
        ("attention_mask", "attention_mask"),
        ("completion_mask", "loss_mask"),
    ):
        assert getattr(request, field) is batch[name]
    if teacher is None:
        assert request.teacher_hidden_states is None
    else:
        assert request.divergence is forward_kl
        with torch.no_grad():
            states = teacher.transformer(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["loss_mask"]
        torch.testing.assert_close(request.teacher_hidden_states[mask], states[:, :-1][mask])
        assert not request.teacher_hidden_states.requires_grad
    scores = SimpleNamespace(logps=torch.tensor([-2.0]), divergence=torch.tensor([5.0]) if kd_ratio else None)
    expected = 0.7 * 2.0 + 0.3 * 5.0 if kd_ratio else 2.0
    assert request.loss(scores, torch.tensor([0])).item() == pytest.approx(expected)
