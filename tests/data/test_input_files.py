"""JSON that was written earlier, and YAML: read where it is as expected, refused with its place where it is not."""

import json
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from minillm_trl.cli import main
from minillm_trl.data import DataError, load_examples
from minillm_trl.errors import FileError
from minillm_trl.files.json_files import misfit, parse_json, read_json
from minillm_trl.files.whole_files import write_whole
from minillm_trl.files.yaml_files import read_yaml
from minillm_trl.training.checkpoints import newest_whole_checkpoint

DEEP = 100_000


class Point(NamedTuple):
    x: float
    name: str | None


class Open(TypedDict):
    points: list[Point]
    pair: tuple[int, int]
    more: NotRequired[dict[str, bool]]


GOOD = {"points": [{"x": 1, "name": None}, {"x": 0.5, "name": "b"}], "pair": [1, 2], "unknown": "passes"}


class TestJson:
    def test_what_fits_has_no_misfit(self):
        assert misfit(GOOD, Open) is None
        assert misfit({**GOOD, "more": {"a": True}}, Open) is None
        assert misfit([object()], Any) is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"points": None}, "points is None, not a list"),
            ({"points": [{"x": True, "name": None}]}, "points[0].x is True, not a number"),
            ({"points": [{"x": 1.0, "name": 2}]}, "points[0].name is 2, not text"),
            ({"points": [{"x": 1.0}]}, "points[0] has no 'name'"),
            ({"points": [{"x": 1.0, "name": None, "z": 1}]}, "points[0] has 'z', which is unknown"),
            ({"pair": [1]}, "pair is [1], not a list"),
            ({"pair": [1, 2.0]}, "pair[1] is 2.0, not an integer"),
            ({"pair": [1, False]}, "pair[1] is False, not an integer"),
            ({"more": {"a": 1}}, "more.a is 1, not true or false"),
        ],
    )
    def test_misfit_names_the_place(self, change: dict, message: str):
        assert misfit({**GOOD, **change}, Open) == message

    def test_missing_names_are_named_at_the_root_too(self):
        assert misfit({"points": []}, Open) == "it has no 'pair'"
        assert misfit([], Open) == "it is [], not an object"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "Expecting property name"),
            (b"\xff", "can't decode byte 0xff"),
            (b"[" * DEEP, "it is nested too deeply"),
            (b"1" * 5000, "Exceeds the limit"),
            (b"[]", "it is [], not an object"),
        ],
    )
    def test_file_that_cannot_be_used_is_named(self, tmp_path: Path, content: bytes, message: str):
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.json: cannot be used") as caught:
            read_json(path, Open, "Write it again.")
        assert message in str(caught.value)
        assert str(caught.value).endswith("Write it again.")
        assert len(str(caught.value)) < 500

    def test_good_json_is_read(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(GOOD))
        assert read_json(path, Open, "") == GOOD
        assert parse_json(b'"\xc3\xa9"') == "é"


class TestYaml:
    def read(self, tmp_path: Path, text: str) -> Any:
        path = tmp_path / "x.yaml"
        path.write_bytes(text.encode())
        return read_yaml(path)[0]

    def test_aliases_stand_for_what_they_name(self, tmp_path):
        text = "a: &kwargs {dtype: float16}\nb: *kwargs\n"
        assert self.read(tmp_path, text) == {"a": {"dtype": "float16"}, "b": {"dtype": "float16"}}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: !!python/object/apply:os.system [ls]\n", ":2: broken YAML: could not determine a constructor"),
            ("a: 1\nb: 2024-13-45\n", ":2: YAML reads '2024-13-45' as a timestamp"),
            ('a: 1\nb: "\\ud800"\n', r":2: '\ud800' has half a surrogate pair"),
            ("a: 1\nb: !!timestamp x\n", ":2: YAML reads 'x' as a timestamp"),
            ("a: &a [*a]\n", ": its aliases"),
            ("a: &a {b: *a}\n", ": its aliases"),
            ("a: " + "[" * 1000, ": its lists and mappings are nested too deeply"),
            ("a:\n  b: 1\n  b: 2\n", ":3: the key 'b' is already in line 2"),
            ("a: [*b]\n", ":1: broken YAML: found undefined alias"),
            ("a: 1\n---\nb: 2\n", ":2: broken YAML: but found another document"),
        ],
    )
    def test_what_cannot_be_read_is_named_with_its_line(self, tmp_path, text: str, message: str):
        with pytest.raises(ValueError, match=r"x\.yaml") as caught:
            self.read(tmp_path, text)
        assert f"x.yaml{message}" in str(caught.value)

    def test_aliases_of_aliases_do_not_fill_the_memory(self, tmp_path):
        lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20))]
        with pytest.raises(ValueError, match=r"its aliases .* 100000 values"):
            self.read(tmp_path, "\n".join(lines))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: {a: 1}", "seed: expected one value, got a mapping"),
            ("seed: null", "seed: expected a value, got null"),
            ("dataset: 1", "dataset: expected text, got '1' without quotes"),
            ("dataset: [a]", "dataset: expected one value, got a list"),
            ("? [a]\n: b", "broken YAML: found unhashable key"),
            ("model_init_kwargs: 5", "model_init_kwargs: expected a mapping, got '5'"),
            ("model_init_kwargs: '[5]'", "model_init_kwargs: expected a mapping, got '[5]'"),
            ("env: [A]", "env: expected lines of `NAME: value`"),
            ("env: {A=B: c}", "env: expected lines of `NAME: value`"),
            ("env: {A: [b]}", "env: expected lines of `NAME: value`"),
        ],
    )
    def test_values_that_an_option_does_not_take_are_named_with_their_line(self, tmp_path, capsys, text, message):
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: x\n{text}\n")
        assert main(["sft", "--config", str(path)]) == 2
        assert f"{path}:2: {message}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "message"), [("a: [1", ":1: broken YAML"), ("- a", ": not a configuration of `accelerate launch`")]
    )
    def test_launch_configurations_are_read_before_anything_is_started(self, tmp_path, capsys, text, message):
        path = tmp_path / "launch.yaml"
        path.write_text(text)
        words = ["sft", "--dataset", "e2e", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
        words += ["--use_cpu", "true", "--bf16", "false", "--accelerate_config", str(path)]
        assert main(words) == 2
        assert f"{path}{message}" in capsys.readouterr().err

    def test_deepspeed_configurations_are_read_too(self, tmp_path, capsys):
        path = tmp_path / "zero.json"
        path.write_text('{"zero_optimization": ')
        words = ["sft", "--dataset", "e2e", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
        assert main([*words, "--use_cpu", "true", "--bf16", "false", "--deepspeed", str(path)]) == 2
        assert f"{path}: cannot be used (Expecting value: line 1 column 23" in capsys.readouterr().err

    def test_no_number_is_no_learning_rate(self, tmp_path, capsys):
        words = ["sft", "--dataset", "e2e", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
        assert main([*words, "--use_cpu", "true", "--bf16", "false", "--learning_rate", "nan"]) == 2
        assert "learning_rate must be a number, got nan" in capsys.readouterr().err


class TestData:
    def test_damaged_arrow_file_is_refused_instead_of_ending_the_process(self, tmp_path):
        Dataset.from_dict({"prompt": ["a mill", "a pub"]}).save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
        offsets = pa.py_buffer(b"\0\0\0\0\6\0\0\0\13\0\0\0").to_pybytes()
        assert offsets in path.read_bytes()  # 0, 6, 11: where the texts begin
        path.write_bytes(path.read_bytes().replace(offsets, b"\0\0\0\0\6\0\0\0\xff\xff\xff\x7f"))
        with pytest.raises(DataError, match="saved: cannot be read as a saved dataset"):
            load_examples(tmp_path / "saved")

    def test_saved_dataset_with_other_values_in_its_files_is_refused(self, tmp_path):
        Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "state.json").write_text('{"_data_files": []}')
        with pytest.raises(DataError, match=r"cannot be read as a saved dataset \(IndexError"):
            load_examples(tmp_path / "saved")

    def test_columns_nested_too_deeply_are_refused_with_their_row(self, tmp_path):
        path = tmp_path / "x.jsonl"
        deep = "[" * 60 + "]" * 60
        path.write_text('{"prompt": "a", "more": [[]]}\n{"prompt": "b", "more": ' + deep + "}\n")
        with pytest.raises(DataError, match=r"x.jsonl:2: field 'more' .* nested in more than 32 levels"):
            load_examples(path)

    @pytest.mark.parametrize("deep", [b"[" * DEEP, b'{"a":' * DEEP, b"1" * 5000])
    def test_json_beyond_what_can_be_read_is_refused_with_its_line(self, tmp_path, deep: bytes):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b'{"prompt": "a"}\n' + deep + b"\n")
        with pytest.raises(DataError, match=r"x.jsonl:2: not readable JSON"):
            load_examples(path)

    def test_parquet_of_a_type_that_datasets_does_not_know_is_refused(self, tmp_path):
        column = pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))
        pyarrow.parquet.write_table(pa.table({"prompt": column}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"x.parquet: cannot be read as Parquet \(Arrow type map"):
            load_examples(tmp_path / "x.parquet")


def test_file_that_cannot_be_written_leaves_nothing_beside_its_place(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match="taken cannot be written"):
        write_whole(tmp_path / "taken", "text")
    write_whole(tmp_path / "free", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "taken"]


def test_folders_that_only_look_like_checkpoints_are_passed_over(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
