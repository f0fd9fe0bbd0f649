"""Mixtures of datasets: TRL's YAML gives TRL's rows, shares hold, and mistakes name the entry."""

import json
from pathlib import Path

import pytest
import yaml
from trl import DatasetMixtureConfig, get_dataset

from minillm_trl.cli.arguments import DataArguments
from minillm_trl.cli.examples import load_splits
from minillm_trl.data.load import load_examples
from minillm_trl.data.mixtures import load_mixture, parse_parts, rows_of_parts
from minillm_trl.errors import UserError


def write_rows(path: Path, count: int, name: str, **columns: str) -> str:
    names = {"prompt": "prompt", "completion": "completion", **columns}
    rows = [{names["prompt"]: f"{name} {i}", names["completion"]: f"c{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("fractions", [(None, None), (1.0, 3.0), (0.5, 0.5)])
def test_rows_are_those_of_trl(tmp_path, fractions):
    paths = [write_rows(tmp_path / f"{name}.jsonl", count, name) for name, count in (("a", 10), ("b", 7))]
    entries = [
        {"path": "json", "data_files": path} | ({} if fraction is None else {"fraction": fraction})
        for path, fraction in zip(paths, fractions, strict=True)
    ]
    expected = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in entries]))["train"]
    found = load_mixture(parse_parts(entries), load_examples)
    assert found["prompt"][:] == expected["prompt"][:]
    assert found["completion"][:] == expected["completion"][:]


@pytest.mark.parametrize(
    ("lengths", "fractions", "expected"),
    [([100, 10], [0.5, 0.5], [10, 10]), ([100, 30], [3, 1], [90, 30]), ([5, 100], [1, 2], [5, 10])],
)
def test_shares_hold_and_no_row_repeats(lengths, fractions, expected):
    assert rows_of_parts(lengths, fractions) == expected


@pytest.mark.parametrize(
    ("lengths", "fractions", "max_rows", "expected"),
    [([90, 30], [3, 1], 8, [6, 2]), ([10, 10, 10], [10, 10, 10], 7, [2, 3, 2]), ([4, 4], [1, 1], 20, [4, 4])],
)
def test_a_limit_keeps_the_shares(lengths, fractions, max_rows, expected):
    assert rows_of_parts(lengths, fractions, max_rows) == expected


def test_a_dataset_that_would_give_no_row_is_named(tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", 10, name) for name in "ab"]
    entries = [{"path": path, "fraction": fraction} for path, fraction in zip(paths, (1000, 1), strict=True)]
    with pytest.raises(UserError, match=r"b.jsonl would give none of the 10 rows"):
        load_mixture(parse_parts(entries), load_examples)


def test_columns_of_other_names_are_mapped(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", 2, "a")
    second = write_rows(tmp_path / "b.jsonl", 2, "b", prompt="question", completion="answer")
    columns = {"prompt": "question", "completion": "answer"}
    found = load_mixture(parse_parts([{"path": first}, {"path": second, "columns": columns}]), load_examples)
    assert found["prompt"][:] == ["a 0", "a 1", "b 0", "b 1"]
    assert found["completion"][:] == ["c0", "c1"] * 2


def test_text_and_conversations_are_not_mixed(tmp_path):
    text = write_rows(tmp_path / "a.jsonl", 2, "a")
    chat = tmp_path / "b.jsonl"
    chat.write_text(json.dumps({"prompt": [{"role": "user", "content": "b"}]}) + "\n")
    with pytest.raises(UserError, match="prompt is a conversation in one of"):
        load_mixture(parse_parts([{"path": text}, {"path": str(chat)}]), load_examples)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "expected a list of entries"),
        (["a.jsonl"], r"datasets\[0\]: expected `path`"),
        ([{"name": "x"}], r"datasets\[0\]: path is missing"),
        ([{"path": "a"}, {"path": "b", "fractoin": 1}], r"datasets\[1\]: unknown key 'fractoin'.*fraction"),
        ([{"path": "a", "fraction": 0.5}, {"path": "b"}], "fraction is set for some entries only"),
        ([{"path": "a", "fraction": -1}], r"datasets\[0\]: fraction must be a positive number, got -1"),
        ([{"path": "a", "fraction": float("inf")}], r"datasets\[0\]: fraction must be a positive number, got inf"),
        ([{"path": "json"}], r"datasets\[0\]: path json needs one file in data_files"),
        ([{"path": "a", "data_dir": "b"}], "data_dir is not supported"),
        ([{"path": "a", "columns": {"promt": "x"}}], "'promt' is no role.*prompt"),
    ],
)
def test_mistakes_name_entry_and_fix(entries, message):
    with pytest.raises(UserError, match=message):
        parse_parts(entries)


class TestArguments:
    def test_evaluation_rows_are_split_off(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", 20, "a")
        data = DataArguments(datasets=[{"path": path}], test_split_size=0.25)
        train, evaluation = load_splits(data, "steps", require_completion=True)
        assert (len(train), len(evaluation)) == (15, 5)
        assert not set(train["prompt"]) & set(evaluation["prompt"])
        assert data.source == path

    def test_evaluation_data_may_be_named(self, tmp_path):
        train, other = (write_rows(tmp_path / f"{name}.jsonl", 4, name) for name in "ab")
        data = DataArguments(datasets=[{"path": train}], eval_dataset=other, max_train_rows=3, max_eval_rows=2)
        rows, evaluation = load_splits(data, "steps", require_completion=True)
        assert rows["prompt"][:] == ["a 0", "a 1", "a 2"]
        assert evaluation["prompt"][:] == ["b 0", "b 1"]

    def test_a_limit_takes_rows_of_all_datasets(self, tmp_path):
        entries = [{"path": write_rows(tmp_path / f"{name}.jsonl", 6, name)} for name in "ab"]
        rows, _ = load_splits(DataArguments(datasets=entries, max_train_rows=4), "no", require_completion=True)
        assert rows["prompt"][:] == ["a 0", "a 1", "b 0", "b 1"]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"datasets": [{"path": "a"}], "dataset_config": "main"}, "dataset_config='main' belongs to dataset_name"),
            ({"datasets": [{"path": "a"}], "dataset_train_split": "x"}, "Set `split` in the entries of datasets"),
            ({}, "dataset_name is missing"),
            ({"dataset_name": "e2e", "datasets": [{"path": "a"}]}, "are both given"),
            ({"dataset_name": "e2e", "test_split_size": 0.5}, "test_split_size belongs to `datasets`"),
            ({"datasets": [{"path": "a"}], "test_split_size": 2.0}, "must lie between 0 and 1, got 2.0"),
        ],
    )
    def test_contradictions_are_refused(self, values, message):
        with pytest.raises(UserError, match=message):
            DataArguments(**values)


def test_yaml_with_a_mixture_is_parsed(tmp_path):
    from minillm_trl.cli.arguments import parse
    from minillm_trl.cli.sft import build_parser

    entries = [{"path": write_rows(tmp_path / "a.jsonl", 4, "a"), "fraction": 1.0}]
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump({"model_name_or_path": "x", "datasets": entries, "output_dir": str(tmp_path)}))
    (data, *_), _ = parse(build_parser(), ["--config", str(config)])
    assert data.datasets == entries


def test_a_part_names_the_teacher_of_its_rows(tmp_path):
    first, second = (write_rows(tmp_path / f"{name}.jsonl", 3, name) for name in ("a", "b"))
    parts = parse_parts([{"path": first, "teacher": "math"}, {"path": second, "teacher": "code"}])
    found = load_mixture(parts, load_examples, teacher_column="topic")
    assert found["topic"][:] == ["math"] * 3 + ["code"] * 3
    with pytest.raises(UserError, match="no `teachers`"):
        load_mixture(parts, load_examples)
    with pytest.raises(UserError, match="column 'completion' already"):
        load_mixture(parts, load_examples, teacher_column="completion")
    with pytest.raises(UserError, match="name of a teacher"):
        parse_parts([{"path": first, "teacher": 5}])


def test_a_column_with_the_teacher_is_kept(tmp_path):
    first, second = (write_rows(tmp_path / f"{name}.jsonl", 2, name, completion="topic") for name in ("a", "b"))
    found = load_mixture(parse_parts([{"path": first}, {"path": second}]), load_examples, teacher_column="topic")
    assert found["topic"][:] == ["c0", "c1"] * 2
