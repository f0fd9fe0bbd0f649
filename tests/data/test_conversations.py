"""Whole conversations and plain texts, which TRL trains on, as every subcommand takes them."""

import json
from types import SimpleNamespace

import pytest
from chat_models import TEXT_END, TURN_END, answer, question, save_chat_model
from datasets import Dataset

from minillm_trl.cli import main
from minillm_trl.cli.arguments import DataArguments
from minillm_trl.cli.examples import load_splits
from minillm_trl.data import DataError, load_corpus, load_examples

TURNS = [*question("a"), *answer("b"), *question("c"), *answer("d")]
SPLIT = {"prompt": TURNS[:3], "completion": TURNS[3:], "references": ["d"]}
TRAINING = ("--use_cpu", "true", "--report_to", "none", "--max_steps", "1", "--per_device_train_batch_size", "2")


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="d.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


class TestMessages:
    def test_last_message_is_the_completion(self, write):
        path = write({"messages": TURNS, "id": 1}, {"messages": TURNS[:2], "id": 2})
        rows = load_examples(path, require_completion=True).to_list()
        assert rows == [
            {**SPLIT, "id": 1},
            {"prompt": TURNS[:1], "completion": TURNS[1:2], "references": ["b"], "id": 2},
        ]

    def test_so_it_is_where_the_rows_come_as_arrow(self, tmp_path):
        for more in ({}, {"id": 1}):
            Dataset.from_list([{"messages": TURNS, **more}]).save_to_disk(tmp_path / "saved")
            assert load_examples(tmp_path / "saved").to_list() == [{**SPLIT, **more}]

    @pytest.mark.parametrize("column", ["messages", "chat"])
    def test_another_column_can_be_named(self, write, column):
        path = write({column: TURNS, "prompt": "x"} if column == "chat" else {column: TURNS}, name="d.jsonl")
        if column == "chat":
            with pytest.raises(DataError, match="prompt_column='chat' becomes 'prompt', but another column"):
                load_examples(path, prompt_column=column)
            path = write({column: TURNS})
        assert load_examples(path, prompt_column=column).to_list() == [SPLIT]

    def test_references_beside_them_are_kept(self, write):
        path = write({"messages": TURNS, "references": ["e", "f"]})
        assert load_examples(path).to_list() == [{**SPLIT, "references": ["e", "f"]}]

    def test_open_conversations_are_prompts_where_no_completion_is_needed(self, write):
        path = write({"messages": TURNS[:3]}, {"messages": TURNS})
        rows = load_examples(path).to_list()
        assert [row["prompt"] for row in rows] == [TURNS[:3], TURNS[:3]]
        assert [row["completion"] for row in rows] == [None, TURNS[3:]]
        with pytest.raises(DataError, match=r"d.jsonl:1: field 'messages' has the roles"):
            load_examples(path, require_completion=True)

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({"messages": 5}, "field 'messages' is 5"),
            ({"messages": answer("a")}, "field 'messages' has the roles"),
            ({"messages": [*question("a"), {"role": "assistant", "tool_calls": [1]}]}, "Tools are not supported"),
            ({"messages": TURNS, "tools": "[]x"}, "field 'tools'"),
            ({"messages": [{"role": "system", "content": "s"}, *answer("a")]}, "has no user message"),
        ],
    )
    def test_bad_row_is_named(self, write, row, problem):
        with pytest.raises(DataError, match=rf"d.jsonl:2.*{problem}"):
            load_examples(write({"messages": TURNS}, row))

    def test_corpus_takes_them(self, write):
        assert load_corpus(write({"messages": TURNS})).to_list() == [
            {key: SPLIT[key] for key in ("prompt", "completion")}
        ]


class TestText:
    def test_it_takes_the_place_of_prompts_where_it_may(self, write):
        path = write({"text": "a b", "id": 1}, {"text": " ", "id": 2})
        assert load_examples(path, text_column="text").to_list() == [{"text": "a b"}]
        with pytest.raises(DataError, match=r"no column 'prompt'.*sft"):
            load_examples(path)

    def test_prompts_come_before_it(self, write):
        path = write({"text": "a", "prompt": "b"})
        assert load_examples(path, text_column="text").column_names == ["prompt", "text"]

    def test_value_that_is_none_is_named(self, write):
        with pytest.raises(DataError, match=r"d.jsonl:2: field 'text' is 3"):
            load_examples(write({"text": "a"}, {"text": 3}), text_column="text")

    def test_split_to_evaluate_on_may_be_text_too(self, write):
        data = DataArguments(write({"words": "a"}), eval_dataset=write({"words": "b"}, name="e.jsonl"))
        train, evaluation = load_splits(data, "no", require_completion=True, text_column="words")
        assert (train.to_list(), evaluation.to_list()) == ([{"words": "a"}], [{"words": "b"}])


@pytest.mark.parametrize(
    ("column", "hint"),
    [("conversations", "`messages`"), ("instruction", "--task instructions"), ("text", "lm_dataset")],
)
def test_column_of_another_tool_is_led_somewhere(write, column, hint):
    with pytest.raises(DataError, match=f"no column 'prompt'.*{hint}"):
        load_examples(write({column: "a"}))


class TestCommands:
    def run(self, tmp_path, monkeypatch, command, *options):
        """The training data of a trainer that is not let train."""
        seen = SimpleNamespace()

        def stop(trainer, *unused):
            seen.trainer = trainer
            return 0

        monkeypatch.setattr("minillm_trl.cli.training.train_and_save", stop)
        words = [command, *map(str, options), "--output_dir", str(tmp_path / "out"), *TRAINING]
        assert main(words) == 0
        return seen.trainer

    def test_sft_learns_the_last_message(self, tmp_path, monkeypatch, write):
        model = save_chat_model(tmp_path / "model", TEXT_END, 0)
        trainer = self.run(
            tmp_path, monkeypatch, "sft", "--model_name_or_path", model, "--dataset", write({"messages": TURNS})
        )
        (row,) = trainer.train_dataset
        decode = trainer.processing_class.decode
        assert decode(row["input_ids"]).count("<|im_start|>") == 4
        assert decode([id_ for id_ in row["labels"] if id_ != -100]) == "d<|im_end|>\n"
        assert trainer.model.generation_config.eos_token_id == [2, 0]

    def test_sft_learns_it_all_as_trl_does_if_told_so(self, tmp_path, monkeypatch, write):
        model = save_chat_model(tmp_path / "model", TURN_END, 2)
        options = ("--dataset", write({"messages": TURNS}), "--completion_only_loss", "false")
        trainer = self.run(tmp_path, monkeypatch, "sft", "--model_name_or_path", model, *options)
        (row,) = trainer.train_dataset
        assert row["labels"] == row["input_ids"]

    @pytest.mark.parametrize("column", ["text", "words"])
    def test_sft_and_kd_learn_texts(self, tmp_path, monkeypatch, write, column):
        model = save_chat_model(tmp_path / "model", TEXT_END, 0)
        options = ["--model_name_or_path", model, "--dataset", write({column: "the mill"})]
        options += [] if column == "text" else ["--dataset_text_field", column]
        for command, more in (("sft", []), ("kd", ["--teacher_model_name_or_path", model])):
            trainer = self.run(tmp_path, monkeypatch, command, *options, *more)
            (row,) = trainer.train_dataset
            assert row["labels"] == row["input_ids"]
            assert trainer.processing_class.decode(row["input_ids"]) == "the mill<|endoftext|>"

    def test_minillm_learns_from_the_prompts_of_messages(self, tmp_path, monkeypatch, write):
        model = save_chat_model(tmp_path / "model", TURN_END, 2)
        options = ("--model_name_or_path", model, "--teacher_model_name_or_path", model, "--max_completion_length", 4)
        data = write({"messages": TURNS}, {"messages": TURNS[:2]})
        options += ("--dataset", data, "--steps_per_generation", 1, "--bf16", "false")
        trainer = self.run(tmp_path, monkeypatch, "minillm", *options)
        assert trainer.train_dataset["prompt"][:] == [TURNS[:3], TURNS[:1]]
