"""Examples that are read while training: the rows of those that are loaded first, checks on the way, refusals."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from test_mixtures import write_rows
from trl import DatasetMixtureConfig, get_dataset

from minillm_trl.cli import main
from minillm_trl.cli.arguments import DataArguments
from minillm_trl.cli.examples import check_stream_ends, load_splits
from minillm_trl.data.load import Columns, load_examples
from minillm_trl.data.mixtures import parse_parts
from minillm_trl.data.streams import load_stream, load_streamed_mixture
from minillm_trl.errors import UserError

CHATS = [
    [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(3)
]


def write_json(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_files(folder: Path, rows: list[dict]) -> dict[str, str]:
    """The rows in every format."""
    dataset = Dataset.from_list(rows)
    dataset.to_csv(folder / "a.csv")
    dataset.to_parquet(folder / "a.parquet")
    (folder / "a.json").write_text(json.dumps(rows))
    write_json(folder / "train.jsonl", rows)
    return {name: str(folder / name) for name in ("a.csv", "a.parquet", "a.json", "train.jsonl")} | {"": str(folder)}


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "train.jsonl", ""])
def test_rows_are_those_that_are_loaded_first(tmp_path, name):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "other": i} for i in range(250)]
    source = in_files(tmp_path, rows)[name]
    stream = load_stream(source, Columns("question", "answer"), max_rows=203)
    loaded = load_examples(source, prompt_column="question", completion_column="answer", max_rows=203)
    assert isinstance(stream, IterableDataset)
    found = list(stream)
    for column in ("prompt", "completion", "references"):
        assert [row[column] for row in found] == loaded[column][:]
    assert list(stream) == found  # a stream can be read again, as a resumed run does


def test_whole_conversations_are_split(tmp_path):
    source = write_json(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    loaded = load_examples(source)
    assert [row["prompt"] for row in load_stream(source, Columns())] == loaded["prompt"][:]
    assert [row["completion"] for row in load_stream(source, Columns())] == loaded["completion"][:]


def test_texts_replace_prompts_where_they_may(tmp_path):
    source = write_json(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two"}])
    stream = load_stream(source, Columns(require_completion=True, text="text"))
    assert [row["text"] for row in stream] == ["one", "two"]
    with pytest.raises(UserError, match="no column 'prompt'"):
        load_stream(source, Columns())


def test_bad_row_is_named_when_it_is_read(tmp_path):
    rows: list[dict] = [{"prompt": f"p{i}"} for i in range(150)]
    rows[120]["prompt"] = ""
    stream = iter(load_stream(write_json(tmp_path / "a.jsonl", rows), Columns()))
    assert len(list(islice(stream, 100))) == 100
    with pytest.raises(UserError, match=r"a.jsonl, row 120 \(counting from 0\): field 'prompt' is empty"):
        list(stream)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([{"question": "q"}], "no column 'prompt'"), ([{"prompt": 3}], "row 0"), ([], "has no rows")],
)
def test_mistakes_in_the_first_rows_are_found_at_once(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_stream(write_json(tmp_path / "a.jsonl", rows), Columns())


def test_sources_that_are_not_streamed_are_refused(tmp_path):
    Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "saved")
    for source in ("e2e", str(tmp_path / "saved")):
        with pytest.raises(UserError, match="Drop dataset_streaming"):
            load_stream(source, Columns())
    with pytest.raises(UserError, match="no such file"):
        load_stream(str(tmp_path / "missing.jsonl"), Columns())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="unknown extension"):
        load_stream(str(tmp_path / "a.txt"), Columns())


class TestMixtures:
    def test_rows_are_those_of_trl(self, tmp_path):
        paths = [write_rows(tmp_path / f"{name}.jsonl", count, name) for name, count in (("a", 3), ("b", 2))]
        entries = [{"path": "json", "data_files": path} for path in paths]
        config = DatasetMixtureConfig(datasets=[dict(entry) for entry in entries], streaming=True)
        expected = [(row["prompt"], row["completion"]) for row in get_dataset(config)["train"]]
        data = DataArguments(datasets=entries, streaming=True)
        train, evaluation = load_splits(data, "no", require_completion=True)
        assert [(row["prompt"], row["completion"]) for row in train] == expected
        assert evaluation is None
        limited, _ = load_splits(DataArguments(datasets=entries, streaming=True, max_train_rows=4), "no", True)
        assert [row["prompt"] for row in limited] == [prompt for prompt, _ in expected[:4]]

    def test_columns_are_mapped(self, tmp_path):
        first = write_rows(tmp_path / "a.jsonl", 2, "a")
        second = write_rows(tmp_path / "b.jsonl", 2, "b", prompt="question", completion="answer")
        columns = {"prompt": "question", "completion": "answer"}
        mixture = load_streamed_mixture(
            parse_parts([{"path": first}, {"path": second, "columns": columns}]), Columns()
        )
        assert [row["prompt"] for row in mixture] == ["a 0", "a 1", "b 0", "b 1"]

    def test_fractions_are_refused_as_in_trl(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", 2, "a")
        with pytest.raises(UserError, match="fraction, which needs the lengths"):
            load_streamed_mixture(parse_parts([{"path": path, "fraction": 1.0}]), Columns())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "a", "streaming": True}, "set dataset_streaming"),
        ({"datasets": [{"path": "a"}], "dataset_streaming": True}, "set streaming"),
        ({"datasets": [{"path": "a"}], "streaming": True, "test_split_size": 0.1}, "eval_dataset"),
    ],
)
def test_settings_that_contradict_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        DataArguments(**values)


def test_a_run_over_a_stream_needs_its_own_end():
    stream = Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()
    check_stream_ends(stream, 3)
    with pytest.raises(UserError, match="max_steps"):
        check_stream_ends(stream, -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "kd", "minillm"])
def test_streamed_training_gives_the_weights_of_a_loaded_one(tmp_path, name):
    """In an order that does not depend on how the rows are read."""
    tokenizer = build_tokenizer()
    for folder, seed in (("student", 0), ("teacher", 1)):
        build_model("llama", len(tokenizer), seed).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    source = write_rows(tmp_path / "train.jsonl", 16, "the mill")
    words = ["--model_name_or_path", str(tmp_path / "student"), "--dataset_name", source, "--use_cpu", "true"]
    words += ["--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
    words += ["--learning_rate", "0.01", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
    if name != "sft":
        words += ["--teacher_model_name_or_path", str(tmp_path / "teacher")]
    if name == "minillm":
        words += ["--shuffle_dataset", "false", "--steps_per_generation", "2", "--max_completion_length", "6"]
    else:
        words += ["--train_sampling_strategy", "sequential"]
    saved = []
    for streaming in ("false", "true"):
        output = tmp_path / streaming
        more = ["--dataset_streaming", streaming, "--max_steps", "3", "--output_dir", str(output)]
        assert main([name, *words, *more]) == 0
        saved.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_streams_that_a_command_cannot_use_are_refused(tmp_path, capsys):
    source = write_rows(tmp_path / "train.jsonl", 2, "a")
    words = ["--model_name_or_path", "student", "--dataset_name", source, "--dataset_streaming", "true"]
    words += ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    for name, message in (("sft", "Set max_steps"), ("seqkd", "does not read them as a stream")):
        more = ["--teacher_model_name_or_path", "teacher"] if name == "seqkd" else []
        assert main([name, *words, *more]) == 2
        assert message in capsys.readouterr().err
