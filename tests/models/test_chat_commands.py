"""Chat models on the command line: prompts as conversations, arguments of the template, and what ends an answer."""

import json
from pathlib import Path

import pytest
import yaml
from chat_models import (
    CHATML,
    TEXT_END,
    TURN_END,
    answer,
    build_chat_model,
    build_chat_tokenizer,
    question,
    save_chat_model,
)

from minillm_trl.cli import main
from minillm_trl.data.templates import format_instruction
from minillm_trl.evaluation.label_words import label_probabilities
from minillm_trl.models.loading import load_tokenizer

HINT = "--chat"
QUESTIONS = [{"question": f"the mill {i}", "reply": f"near the river {i}"} for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A base model on its way to a chat model: the template ends a turn with another token than all else."""
    return save_chat_model(tmp_path_factory.mktemp("model"), TEXT_END, 0)


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return str(path)


class TestGenerate:
    def run(self, capsys, *words: object) -> tuple[list[dict], str]:
        assert main(["generate", *map(str, words), "--max_new_tokens", "5"]) == 0
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    def test_chat_makes_messages_of_texts(self, capsys, model, data):
        for source in (
            ("--prompt", "the mill 0"),
            ("--dataset", data, "--prompt_column", "question", "--max_rows", 1),
        ):
            rows, error = self.run(capsys, "--model", model, "--chat", *source)
            assert rows[0]["prompt"] == question("the mill 0")
            assert HINT not in error

    def test_texts_for_a_chat_model_are_hinted_at(self, capsys, model):
        rows, error = self.run(capsys, "--model", model, "--prompt", "the mill 0")
        assert rows[0]["prompt"] == "the mill 0"
        assert HINT in error

    @pytest.mark.parametrize("prompt", [format_instruction("the mill"), "<|im_start|>user\nthe mill<|im_end|>\n"])
    def test_texts_that_are_meant_so_are_not(self, capsys, model, prompt):
        assert HINT not in self.run(capsys, "--model", model, "--prompt", prompt)[1]

    def test_tokenizer_without_template(self, capsys, tmp_path):
        folder = save_chat_model(tmp_path, TEXT_END, 0)
        (tmp_path / "chat_template.jinja").unlink()
        assert HINT not in self.run(capsys, "--model", folder, "--prompt", "the mill")[1]
        assert main(["generate", "--model", folder, "--prompt", "the mill", "--chat"]) == 2
        assert "has no chat template" in capsys.readouterr().err

    def test_template_is_given_its_arguments_and_answers_end_as_told(self, capsys, model, monkeypatch):
        seen = {}

        def sample(model, prompt_ids, **options):
            seen.update(options, prompt_ids=prompt_ids)
            return [[2]] * len(prompt_ids)

        monkeypatch.setattr("minillm_trl.rollouts.prompts.sample_prompts", sample)
        words = ("--model", model, "--prompt", "the mill", "--chat")
        rows, _ = self.run(capsys, *words)
        assert (seen["eos_token_ids"], rows[0]["finished"]) == ([0, 2], True)
        before = seen["prompt_ids"]
        rows, _ = self.run(
            capsys, *words, "--eos_tokens", TEXT_END, "--chat_template_kwargs", '{"add_generation_prompt": false}'
        )
        assert (seen["eos_token_ids"], rows[0]["finished"]) == ([0], False)
        assert len(seen["prompt_ids"][0]) < len(before[0])

    def test_bad_value_is_refused(self, capsys, model):
        assert main(["generate", "--model", model, "--prompt", "a", "--eos_tokens", "<|eot|>"]) == 2
        assert "eos_tokens: " in capsys.readouterr().err
        assert main(["generate", "--model", model, "--prompt", "a", "--chat_template_kwargs", "[1]"]) == 2
        assert "JSON object" in capsys.readouterr().err


class TestEvaluate:
    def run(self, folder: Path, *words: object) -> list[dict]:
        options = ("--split", "test", "--max_new_tokens", 3, "--seeds", 1, "--output_dir", folder)
        assert main(["evaluate", *map(str, (*words, *options))]) == 0
        return [json.loads(line) for line in (folder / "samples.jsonl").open()]

    def test_columns_of_other_names_become_conversations(self, tmp_path, capsys, model, data):
        words = ("--model", model, "--dataset", data, "--prompt_column", "question", "--completion_column", "reply")
        samples = self.run(tmp_path / "chat", *words, "--chat")
        assert [row["prompt"] for row in samples] == [question(row["question"]) for row in QUESTIONS]
        assert HINT not in capsys.readouterr().err
        texts = self.run(tmp_path / "texts", *words)
        assert HINT in capsys.readouterr().err
        losses = [
            json.loads((tmp_path / name / "results.json").read_text())["summary"]["loss"]["mean"]
            for name in ("chat", "texts")
        ]
        assert losses[0] != losses[1]
        assert texts[0]["prompt"] == "the mill 0"

    def test_options_of_a_file_are_those_of_the_command_line(self, tmp_path, model, data, capsys):
        options = {
            "chat": True,
            "eos_tokens": [TURN_END],
            "chat_template_kwargs": {"add_generation_prompt": False},
            "prompt_column": "question",
            "completion_column": "reply",
        }
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(options))
        words = ("--model", model, "--dataset", data)
        self.run(tmp_path / "out", "--config", path, *words)
        settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
        assert {name: settings[name] for name in options} == options
        for name in ("eos_tokens", "chat_template_kwargs", "chat"):  # results of other options are others
            path.write_text(yaml.safe_dump({**options, name: None}))
            command = ["evaluate", "--config", str(path), *words, "--split", "test", "--max_new_tokens", "3"]
            assert main([*command, "--seeds", "1", "--output_dir", str(tmp_path / "out")]) == 2
            assert f"holds results of {name}=" in capsys.readouterr().err

    def test_label_words_get_the_arguments_of_the_template(self):
        tokenizer = build_chat_tokenizer(template="{{ note }}" + CHATML)
        model = build_chat_model(tokenizer, 2)
        found = [
            label_probabilities(
                model, tokenizer, [question("a")], ["the", "mill"], chat_template_kwargs={"note": note}
            )
            for note in ("the pub ", "river river ")
        ]
        assert found[0].tolist() != found[1].tolist()


class TestPrepareData:
    def run(self, folder: Path, data: str, *words: str) -> list[dict]:
        columns = ("--prompt_column", "question", "--completion_column", "reply")
        command = ["prepare-data", "--task", "examples", "--source", data, "--output_dir", str(folder)]
        assert main([*command, *(() if "--no_columns" in words else columns), *words]) == 0
        return [json.loads(line) for line in (folder / "train.jsonl").open()]

    def test_columns_of_other_names_become_conversations(self, tmp_path, data):
        rows = self.run(tmp_path / "out", data, "--template", "chat")
        by_prompt = {row["prompt"][0]["content"]: row for row in rows}
        assert len(by_prompt) == 4
        for row in QUESTIONS:
            made = by_prompt[row["question"]]
            assert made["prompt"] == question(row["question"])
            assert made["completion"] == answer(row["reply"])
            assert made["references"] == [row["reply"]]

    def test_or_the_wrapper_of_instructions(self, tmp_path, data):
        rows = self.run(tmp_path / "out", data, "--template", "alpaca")
        assert {row["prompt"] for row in rows} == {format_instruction(row["question"]) for row in QUESTIONS}
        assert {row["completion"] for row in rows} == {row["reply"] for row in QUESTIONS}

    def test_texts_stay_as_they_are_by_default(self, tmp_path, data):
        assert {row["prompt"] for row in self.run(tmp_path / "out", data)} == {row["question"] for row in QUESTIONS}
        words = ["prepare-data", "--task", "examples", "--source", data, "--output_dir", str(tmp_path / "out")]
        words += ["--prompt_column", "question", "--completion_column", "reply", "--template", "alpaca"]
        assert main(words) == 2  # not what is there

    def test_prompts_and_empty_completions(self, tmp_path):
        path = tmp_path / "p.jsonl"
        path.write_text('{"prompt": "a"}\n')
        command = ["prepare-data", "--task", "examples", "--template", "chat"]
        assert main([*command, "--source", str(path), "--output_dir", str(tmp_path / "a")]) == 0
        assert json.loads((tmp_path / "a/train.jsonl").read_text()) == {"prompt": question("a")}
        path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": " "}\n')
        assert main([*command, "--source", str(path), "--output_dir", str(tmp_path / "b")]) == 0
        assert "completion is empty" in (tmp_path / "b/statistics.json").read_text()

    @pytest.mark.parametrize(
        "row", [{"messages": [*question("a"), *answer("b")]}, {"prompt": question("a"), "completion": answer("b")}]
    )
    def test_conversations_take_no_template(self, tmp_path, capsys, row):
        path = tmp_path / "m.jsonl"
        path.write_text(json.dumps(row) + "\n")
        words = ["prepare-data", "--task", "examples", "--template", "chat", "--source", str(path)]
        assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
        assert "m.jsonl:1: the prompt is a conversation" in capsys.readouterr().err

    def test_lengths_are_measured_with_the_arguments_of_the_template(self, tmp_path, model, data):
        means = []
        for name, more in (("a", ()), ("b", ("--chat_template_kwargs", '{"add_generation_prompt": false}'))):
            self.run(tmp_path / name, data, "--template", "chat", "--tokenizer", model, *more)
            statistics = json.loads((tmp_path / name / "statistics.json").read_text())
            means.append(statistics["splits"]["train"]["prompt_length"]["50%"])
        assert means[0] > means[1]


def test_instructions_are_told_where_messages_are_taken(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": [*question("a"), *answer("b")]}) + "\n")
    words = ["prepare-data", "--task", "instructions", "--source", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "--task examples" in error
    assert "`messages`" in error


class TestDoctor:
    def run(self, tmp_path, capsys, student, teacher, **options) -> str:
        options = {"model_name_or_path": student, "teacher_model_name_or_path": teacher, **options}
        options |= {"dataset": "d.jsonl", "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False}
        options |= {"max_completion_length": 8}
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(options))
        main(["doctor", "--config", str(path)])
        return capsys.readouterr().out

    def test_it_names_what_ends_completions(self, tmp_path, capsys, model):
        text = self.run(tmp_path, capsys, model, model)
        assert "Texts end with '<|endoftext|>' (the tokenizer and" in text
        assert "'<|im_end|>' (the chat template)" in text.split("Conversations end with")[1]
        assert f"Texts end with '{TURN_END}' (eos_tokens)" in self.run(
            tmp_path, capsys, model, model, eos_tokens=[TURN_END]
        )

    def test_it_names_doubts(self, tmp_path, capsys, model):
        teacher = save_chat_model(tmp_path / "teacher", TURN_END, 70)
        text = self.run(tmp_path, capsys, model, teacher)
        assert "'<|im_end|>' (the teacher's tokenizer)" in text
        assert "(id 70)" in text


def test_tokenizer_without_eos_is_padded_with_the_end_of_a_turn(tmp_path, capsys):
    tokenizer = build_chat_tokenizer(None)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == TURN_END
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        load_tokenizer(str(tmp_path))
