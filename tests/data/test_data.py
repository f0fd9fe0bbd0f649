"""Loading, its errors with file and line, and the views for training and evaluation."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from minillm_trl.cli import main
from minillm_trl.cli.arguments import DataArguments
from minillm_trl.cli.examples import distinct_prompts, load_splits
from minillm_trl.data import DataError, check_prompt_lengths, load_corpus, load_examples, unique_prompts

USER = {"role": "user", "content": "Where is the pub?"}
ASSISTANT = {"role": "assistant", "content": "By the river."}
GOOD = '{"prompt": "x"}\n'


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def json_lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# formats


def test_json_lines_with_blank_lines_give_prompt_completion_and_references(write):
    path = write(
        "a.jsonl", '\n{"prompt": "Café\u2028£", "completion": "c1", "id": 7}\n\n{"prompt": "q", "completion": "c2"}'
    )
    assert load_examples(path).to_list() == [
        {"prompt": "Café\u2028£", "completion": "c1", "references": ["c1"], "id": 7},
        {"prompt": "q", "completion": "c2", "references": ["c2"], "id": None},
    ]


def test_json_lines_with_byte_order_mark_and_windows_line_ends_load(write):
    path = write("a.jsonl", b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": "y"}\r\n')
    assert load_examples(path).to_list() == [{"prompt": "x"}, {"prompt": "y"}]


ROWS = [{"prompt": "Café, £5", "completion": "a\nb"}, {"prompt": "q", "completion": "c"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(*ROWS)),
        ("a.jsonl.gz", gzip.compress(json_lines(*ROWS).encode(), mtime=0)),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", 'prompt,completion\n"Café, £5","a\nb"\n\nq,c\n'),
    ],
)
def test_every_text_format_gives_the_same_rows(write, name, content):
    expected = [{**row, "references": [row["completion"]]} for row in ROWS]
    assert load_examples(write(name, content)).to_list() == expected


def test_parquet_gives_the_same_rows(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert load_examples(tmp_path / "a.parquet")["references"][:] == [["a\nb"], ["c"]]


def test_csv_keeps_text_that_looks_like_numbers_and_reads_empty_cells_as_null(write):
    path = write("a.csv", "prompt,completion\n007,NA\nNaN,\n")
    assert load_examples(path).to_list() == [
        {"prompt": "007", "completion": "NA", "references": ["NA"]},
        {"prompt": "NaN", "completion": None, "references": []},
    ]


def test_csv_cells_may_be_long(write):
    text = "x" * 200_000
    before = csv.field_size_limit()
    assert load_examples(write("a.csv", f"prompt\n{text}\n"))["prompt"][:] == [text]
    assert csv.field_size_limit() == before


def test_field_whose_name_arrow_cannot_hold_is_named(write):
    with pytest.raises(DataError, match=r"a.jsonl:1: the name of field '\\x00a' has a null character"):
        load_examples(write("a.jsonl", '{"prompt": "x", "\\u0000a": 1}\n'))


def test_surrogate_pairs_load_and_halves_are_refused_in_json_arrays_too(write):
    path = write("a.json", '[{"prompt": "\\ud83d\\ude00"}, {"prompt": "b", "id": ["\\ude00"]}]')
    assert load_examples(path, max_rows=1)["prompt"][:] == ["\N{GRINNING FACE}"]
    with pytest.raises(DataError, match=r"a.json, row 1 \(counting from 0\): field 'id' is .* half a surrogate pair"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines({"prompt": "x"}, {"prompt": "y"}) + "broken\n"),
        ("a.json", '[{"prompt": "x"}, {"prompt": "y"}, "broken"]'),
        ("a.csv", "prompt\nx\ny\nbroken,broken\n"),
    ],
)
def test_max_rows_reads_only_the_first_rows(write, name, content):
    path = write(name, content)
    assert load_examples(path, max_rows=2)["prompt"][:] == ["x", "y"]
    assert load_examples(path, max_rows=1)["prompt"][:] == ["x"]


# columns


def test_named_columns_are_renamed_and_a_single_reference_becomes_a_list(write):
    rows = [{"q": "p1", "a": "c1", "refs": "r1"}, {"q": "p2", "a": "c2", "refs": ["r2", "r3"]}]
    loaded = load_examples(
        write("a.jsonl", json_lines(*rows)), prompt_column="q", completion_column="a", references_column="refs"
    )
    assert loaded.to_list() == [
        {"prompt": "p1", "completion": "c1", "references": ["r1"]},
        {"prompt": "p2", "completion": "c2", "references": ["r2", "r3"]},
    ]


def test_prompts_alone_have_neither_completion_nor_references(write):
    assert load_examples(write("a.jsonl", json_lines({"prompt": "x"}))).column_names == ["prompt"]


def test_conversations_load_and_the_first_answer_is_the_reference(write):
    system = {"role": "system", "content": ""}
    row = {"prompt": [system, USER], "completion": [ASSISTANT, USER, {"role": "assistant", "content": "Later."}]}
    assert load_examples(write("a.jsonl", json_lines(row))).to_list() == [{**row, "references": ["By the river."]}]


# splits


def test_single_set_of_rows_is_loaded_whatever_the_split(write, tmp_path):
    Dataset.from_dict({"prompt": ["x"]}).save_to_disk(tmp_path / "saved")
    assert load_examples(write("a.jsonl", GOOD), split="test").to_list() == [{"prompt": "x"}]
    assert load_examples(tmp_path / "saved", split="test").to_list() == [{"prompt": "x"}]
    Dataset.from_dict({"prompt": ["x"]}).with_format("numpy", columns=[]).save_to_disk(tmp_path / "hidden")
    assert load_examples(tmp_path / "hidden").to_list() == [{"prompt": "x"}]


def test_folder_of_split_files_gives_the_named_split(write, tmp_path):
    write("train.jsonl", json_lines({"prompt": "x"}))
    write("test.csv", "prompt\ny\n")
    assert load_examples(tmp_path)["prompt"][:] == ["x"]
    assert load_examples(str(tmp_path), split="test")["prompt"][:] == ["y"]


def test_saved_datasets_load_from_their_folders(tmp_path):
    one = Dataset.from_dict({"prompt": ["x", "y"]})
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    assert load_examples(tmp_path / "one", max_rows=1)["prompt"][:] == ["x"]
    assert load_examples(tmp_path / "both", split="test")["prompt"][:] == ["y"]


# errors: in a file. `place` follows the file's path.


@pytest.mark.parametrize(
    ("name", "content", "place", "message"),
    [
        ("a.jsonl", GOOD + '\n{"prompt": "y"\n', ":3: ", "column 15: not valid JSON (Expecting ',' delimiter)"),
        ("a.jsonl", GOOD + "[1]\n", ":2: ", "the line is [1], "),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "\xff"}', ":2: ", "byte 13 of the line (0xff) is not UTF-8"),
        ("a.jsonl", "\n \n", ": ", "has no rows"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD.encode() * 9, mtime=0)[:-9],
            ":10: ",
            "cannot be read (Compressed file ended",
        ),
        ("a.jsonl.gz", GOOD, ":1: ", "cannot be read (Not a gzipped file"),
        ("a.json", GOOD + GOOD, ":2: ", "column 1: not valid JSON (Extra data)"),
        ("a.json", '{"data": []}', ":1: ", "the file is {'data': []}, "),
        ("a.json", '[{"prompt": "x"}, 3]', ", row 1 (counting from 0): ", "is 3, "),
        ("a.json", "[]", ": ", "has no rows"),
        ("a.json", "", ": ", "has no rows"),
        ("a.csv", 'prompt,b\n"x\ny",c\nd\n', ":4: ", "1 cells under a header of 2 ('prompt', 'b')"),
        ("a.csv", 'prompt,b\n"x\n\ny",\n"z\n', ":5: ", "not valid CSV (unexpected end of data)"),
        ("a.csv", "prompt,b\nd\n", ":2: ", "1 cells under a header of 2 ('prompt', 'b')"),
        ("a.csv", "prompt,prompt\nx,y\n", ":1: ", "'prompt', 'prompt'"),
        ("a.csv", "prompt\n", ": ", "has no rows"),
        ("a.csv", b"prompt\nx\n\xe9\n", ":3: ", "byte 1 of the line (0xe9) is not UTF-8"),
        ("a.parquet", "nothing", ": ", "cannot be read as Parquet"),
        ("a.txt", GOOD, ": ", "unknown extension '.txt'. Known are '.jsonl', '.jsonl.gz'"),
    ],
)
def test_broken_file_names_its_place(write, name, content, place, message):
    path = write(name, content)
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}{place}")
    assert message in str(error.value)


# errors: in a row. Each stands on line 3, after a good row and a blank line.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "c"}, "field 'prompt' is missing or null"),
        ({"prompt": None}, "field 'prompt' is missing or null"),
        ({"prompt": " \n"}, "field 'prompt' is empty (' \\n')"),
        ({"prompt": 5}, "field 'prompt' is 5 (int)"),
        ({"prompt": {"text": "x"}}, "field 'prompt' is {'text': 'x'} (dict)"),
        ({"prompt": []}, "field 'prompt' is an empty list of messages"),
        ({"prompt": [USER]}, "field 'prompt' is a conversation"),
        ({"prompt": ["x"]}, "field 'prompt', message 0 (counting from 0) is 'x'"),
        ({"prompt": "x", "completion": ""}, "field 'completion' is empty ('')"),
        ({"prompt": "x", "completion": [ASSISTANT]}, "field 'completion' is a conversation"),
        ({"prompt": "x", "references": None}, "field 'references' is None"),
        ({"prompt": "x", "references": []}, "field 'references' is []"),
        ({"prompt": "x", "references": ["r", 3]}, "field 'references' is ['r', 3]"),
        ({"prompt": "x", "references": "r", "id": "seven"}, "field 'id' is 'seven', which does not fit its column"),
        ({"prompt": "\ud800", "references": "r"}, "field 'prompt' is '\\ud800', which has half a surrogate"),
    ],
)
def test_bad_row_names_file_line_field_and_value(write, row, message):
    good = {"prompt": "good", "completion": "c", "id": 1}
    if "references" in row:
        good["references"] = "r"
    path = write("a.jsonl", json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([USER, {"role": "usr", "content": "x"}], "message 1 (counting from 0) has the role 'usr'; known are"),
        ([{"content": "x"}], "message 0 (counting from 0) has the role None"),
        ([{"role": "user"}], "message 0 (counting from 0) has the content None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has the content [{'type': 'image'}]. Make it text"),
        ([USER, ASSISTANT], "ends with an assistant message"),
        ([USER, {"role": "user", "content": " "}], "message 1 (counting from 0) is the user's and empty"),
        ([{"role": "system", "content": "Be brief."}], "has no user message"),
        ("text", "is a text, 'text', but the rows from"),
    ],
)
def test_bad_conversation_names_file_line_and_message(write, prompt, message):
    path = write("a.jsonl", json_lines({"prompt": [USER]}, {"prompt": prompt}))
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:2: field 'prompt'")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("text", "is a text, 'text', but its prompt is a conversation"),
        ([USER], "begins with the role 'user'"),
        ([{"role": "assistant", "content": ""}], "begins with an empty message"),
    ],
)
def test_completion_that_does_not_answer_its_conversation_is_refused(write, completion, message):
    path = write("a.jsonl", json_lines({"prompt": [USER], "completion": completion}))
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:1: field 'completion' {message}")


def test_null_completion_is_refused_only_where_one_is_required(write):
    path = write("a.jsonl", json_lines({"prompt": "x", "completion": "c"}, {"prompt": "y", "completion": None}))
    assert load_examples(path)["references"][:] == [["c"], []]
    with pytest.raises(DataError) as error:
        load_examples(path, require_completion=True)
    assert str(error.value).startswith(f"{path}:2: field 'completion' is missing or null")


def test_bad_row_of_parquet_names_the_row(tmp_path):
    Dataset.from_dict({"prompt": ["x", ""]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError) as error:
        load_examples(tmp_path / "a.parquet")
    assert str(error.value).startswith(f"{tmp_path}/a.parquet, row 1 (counting from 0): field 'prompt' is empty")


# errors: of the request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_column": "promt"},
            "no column 'promt'; its columns are 'Prompt', 'answer', 'completion'. Did you mean",
        ),
        ({}, "no column 'prompt'; its columns are 'Prompt', 'answer', 'completion'. Did you mean 'Prompt'?"),
        ({"prompt_column": "Prompt", "completion_column": "anwser"}, "no column 'anwser'"),
        ({"prompt_column": "Prompt", "references_column": "refs"}, "no column 'refs'"),
        ({"prompt_column": "answer", "completion_column": "answer"}, "column 'answer' is named by two options"),
        (
            {"prompt_column": "Prompt", "completion_column": "answer"},
            "completion_column='answer' becomes 'completion'",
        ),
    ],
)
def test_wrong_column_lists_the_columns(write, options, message):
    path = write("a.jsonl", json_lines({"Prompt": "x", "answer": "y", "completion": "z"}))
    with pytest.raises(DataError) as error:
        load_examples(path, **options)
    assert str(error.value).startswith(f"{path}: {message}")


def test_missing_completion_column_is_refused_where_required(write):
    path = write("a.jsonl", json_lines({"prompt": "x", "completions": "y"}))
    with pytest.raises(DataError, match=r"no column 'completion'; .* Did you mean 'completions'"):
        load_examples(path, require_completion=True)


def test_missing_file_offers_the_nearest_name(write, tmp_path):
    write("train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"trian.jsonl: no such file or folder. Did you mean 'train.jsonl'"):
        load_examples(tmp_path / "trian.jsonl")


def test_folder_without_the_split_lists_what_it_holds(write, tmp_path):
    write("train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no file of the split 'validation'; it holds 'train.jsonl'"):
        load_examples(tmp_path, split="validation")


def test_folder_of_plain_text_is_not_offered_for_examples(write, tmp_path):
    write("train.txt", "x\n")
    with pytest.raises(DataError, match=r"it holds 'train.txt'\. Keep one of train.jsonl, .* and train.parquet there"):
        load_examples(tmp_path)


def test_folder_with_two_files_of_a_split_is_ambiguous(write, tmp_path):
    write("train.jsonl", GOOD)
    write("train.csv", "prompt\nx\n")
    with pytest.raises(DataError, match="more than one file of the split 'train'"):
        load_examples(tmp_path)


def test_saved_splits_without_the_split_are_refused(tmp_path):
    one = Dataset.from_dict({"prompt": ["x"]})
    DatasetDict({"train": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"no split 'trian'; its splits are 'train'. Did you mean 'train'"):
        load_examples(tmp_path / "both", split="trian")


def test_name_that_is_nowhere_says_neither_local_nor_on_the_hub():
    with pytest.raises(DataError, match=r"^nobody/nothing: neither a local file or folder, nor loadable from the hub"):
        load_examples("nobody/nothing")


def test_hub_dataset_is_asked_for_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_dict({"prompt": ["x", ""]})

    monkeypatch.setattr("minillm_trl.data.load.load_dataset", load_dataset)
    assert load_examples("owner/name", split="test", dataset_config="en", max_rows=1)["prompt"][:] == ["x"]
    assert asked == [(("owner/name", "en"), {"split": "test"})]
    with pytest.raises(DataError, match=r"^owner/name \(train\), row 1 \(counting from 0\): field 'prompt' is empty"):
        load_examples("owner/name")


def test_options_that_cannot_apply_are_refused(write):
    path = write("a.jsonl", GOOD)
    with pytest.raises(DataError, match="max_rows=0 leaves no rows"):
        load_examples(path, max_rows=0)
    with pytest.raises(DataError, match="dataset_config='en' chooses a configuration of a dataset on the hub"):
        load_examples(path, dataset_config="en")


# views


def test_unique_prompts_pools_different_references_in_order():
    dataset = Dataset.from_dict(
        {
            "prompt": ["b", "a", "b", "b"],
            "completion": ["r1", "r2", "r1", "r3"],
            "references": [["r1"], ["r2"], ["r1"], ["r3", "r0"]],
            "id": [1, 2, 3, 4],
        }
    )
    assert unique_prompts(dataset).to_list() == [
        {"prompt": "b", "id": 1, "references": ["r1", "r3", "r0"]},
        {"prompt": "a", "id": 2, "references": ["r2"]},
    ]


def test_distinct_prompts_say_how_many_rows_they_came_from(capsys):
    rows = Dataset.from_dict({"prompt": ["a", "b", "a", "a"]})
    assert distinct_prompts(rows, "my.jsonl")["prompt"][:] == ["a", "b"]
    assert capsys.readouterr().err == "my.jsonl: 4 rows have 2 different prompts. Each prompt is used once.\n"
    distinct_prompts(rows.select([0, 1]), "my.jsonl")
    assert capsys.readouterr().err == ""


def test_too_few_prompts_for_a_rollout_are_told_with_the_rows_that_they_came_from(write, capsys):
    data = write("a.jsonl", json_lines(*({"prompt": f"mill {number % 3}"} for number in range(12))))
    words = ["--dataset_name", str(data), "--model_name_or_path", "none", "--teacher", "none", "--output_dir", "out"]
    assert main(["minillm", *words, "--use_cpu", "true", "--per_device_train_batch_size", "4"]) == 2
    assert "has 3 prompts (12 rows have 3 different prompts), too few for one rollout" in capsys.readouterr().err


def test_unique_prompts_keeps_a_prompt_for_each_value_of_a_column():
    dataset = Dataset.from_dict({"prompt": ["a", "a", "a"], "teacher": ["x", "y", "x"]})
    assert unique_prompts(dataset, by="teacher").to_list() == dataset.select([0, 1]).to_list()
    assert len(unique_prompts(dataset)) == len(unique_prompts(dataset, by="topic")) == 1


def test_unique_prompts_compares_conversations_message_by_message():
    other = {"role": "user", "content": "Where is the mill?"}
    dataset = Dataset.from_dict({"prompt": [[USER], [other], [USER]]})
    assert unique_prompts(dataset).to_list() == [{"prompt": [USER]}, {"prompt": [other]}]


def test_prompt_lengths_at_the_limit_pass_and_above_it_name_the_first_row(tokenizer):
    prompts = ["ab", "abc", "abcd"]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert lengths == [2, 3, 4]
    dataset = Dataset.from_dict({"prompt": prompts})
    check_prompt_lengths(dataset, tokenizer, max_prompt_tokens=4, source="a.jsonl")
    message = r"^a.jsonl: 2 of 3 prompts have more than 2 tokens; the first is row 1 \(.*\) with 3 tokens, 'abc'"
    with pytest.raises(DataError, match=message):
        check_prompt_lengths(dataset, tokenizer, max_prompt_tokens=2, source="a.jsonl")


def test_conversations_are_measured_through_the_chat_template(tokenizer, monkeypatch):
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab"}]]})
    with pytest.raises(DataError, match="has no chat template"):
        check_prompt_lengths(dataset, tokenizer, max_prompt_tokens=9, source="a.jsonl")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}##{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    check_prompt_lengths(dataset, tokenizer, max_prompt_tokens=4, source="a.jsonl")
    with pytest.raises(DataError, match="with 4 tokens"):
        check_prompt_lengths(dataset, tokenizer, max_prompt_tokens=3, source="a.jsonl")


class TestCorpus:
    def write(self, tmp_path: Path, name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    def test_text_file_has_a_document_a_line(self, tmp_path: Path):
        corpus = load_corpus(self.write(tmp_path, "corpus.txt", "the mill\n\n the pub \n"))
        assert corpus["text"] == ["the mill", " the pub "]

    def test_compressed_text_file_is_read_too(self, tmp_path: Path):
        path = tmp_path / "corpus.txt.gz"
        path.write_bytes(gzip.compress(b"the mill\n"))
        assert load_corpus(path)["text"] == ["the mill"]

    def test_folder_with_a_text_file_of_the_split(self, tmp_path: Path):
        self.write(tmp_path, "train.txt", "the mill\n")
        self.write(tmp_path, "test.jsonl", '{"text": "the pub"}\n')
        assert load_corpus(tmp_path)["text"] == ["the mill"]
        assert load_corpus(tmp_path, split="test")["text"] == ["the pub"]
        with pytest.raises(DataError, match="no file of the split 'dev'"):
            load_corpus(tmp_path, split="dev")

    def test_column_of_text_makes_plain_text_and_empty_ones_are_left_out(self, tmp_path: Path):
        rows = [{"body": "a"}, {"body": " "}, {"body": "b"}]
        path = self.write(tmp_path, "c.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert load_corpus(path, text_column="body")["text"] == ["a", "b"]
        assert load_corpus(path, text_column="body", max_rows=1)["text"] == ["a"]

    def test_without_one_prompts_and_completions_are_read(self):
        corpus = load_corpus("e2e", split="validation")
        assert corpus.column_names == ["prompt", "completion"]

    @pytest.mark.parametrize(
        ("name", "text", "options", "message"),
        [
            ("c.jsonl", '{"text": "a"}\n{"text": 3}\n', {}, r"c.jsonl:2: field 'text' is 3\. Make it text"),
            ("c.jsonl", '{"text": ""}\n', {}, "all texts of the field 'text' are empty"),
            ("c.jsonl", '{"txt": "a"}\n', {}, "neither a column 'text' nor the columns 'prompt' and 'completion'"),
            ("c.jsonl", '{"text": "a"}\n', {"text_column": "txt"}, "no column 'txt'; .* Did you mean 'text'"),
            (
                "c.jsonl",
                '{"prompt": "a", "completion": null}\n',
                {},
                "c.jsonl:1: field 'completion' is missing or null",
            ),
            ("c.txt", "\n\n", {}, "has no rows"),
            ("c.txt", "a\n", {"dataset_config": "en"}, "chooses a configuration of a dataset on the hub"),
            ("none.txt", None, {}, "none.txt:1: cannot be read"),
            ("c.jsonl", '{"text": "a"}\n', {"streaming": True}, "cannot be streamed from the hub"),
        ],
    )
    def test_mistake_is_named(self, tmp_path: Path, name: str, text: str, options: dict, message: str):
        path = tmp_path / name if text is None else self.write(tmp_path, name, text)
        with pytest.raises(DataError, match=message):
            load_corpus(path, **options)


class TestSplitsForTraining:
    @pytest.mark.parametrize("kind", ["file", "home", "saved"])
    def test_evaluation_on_a_split_of_what_has_none_is_refused(self, tmp_path: Path, monkeypatch, kind: str):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "d.jsonl").write_text(GOOD)
        Dataset.from_dict({"prompt": ["x"]}).save_to_disk(tmp_path / "saved")
        source = {"file": str(tmp_path / "d.jsonl"), "home": "~/d.jsonl", "saved": "~/saved"}[kind]
        assert load_splits(DataArguments(source), "no", False)[0]["prompt"][:] == ["x"]
        with pytest.raises(ValueError, match=f"{source} has no splits, .* Name other data with eval_dataset"):
            load_splits(DataArguments(source, dataset_test_split="validation"), "steps", False)

    def test_splits_of_a_saved_dataset_are_told_apart(self, tmp_path: Path):
        splits = {"train": Dataset.from_dict({"prompt": ["x"]}), "test": Dataset.from_dict({"prompt": ["y"]})}
        DatasetDict(splits).save_to_disk(tmp_path / "saved")
        data = DataArguments(str(tmp_path / "saved"), dataset_test_split="test")
        assert [part["prompt"][:] for part in load_splits(data, "steps", False)] == [["x"], ["y"]]

    def test_configuration_is_that_of_the_training_data(self, write, monkeypatch):
        asked = []

        def load_dataset(name, configuration, split):
            asked.append((name, configuration, split))
            return Dataset.from_dict({"prompt": ["x"]})

        monkeypatch.setattr("minillm_trl.data.load.load_dataset", load_dataset)
        path = write("eval.jsonl", json_lines({"prompt": "y"}))
        data = DataArguments("owner/name", dataset_config="en", eval_dataset=str(path))
        assert load_splits(data, "steps", False)[1]["prompt"][:] == ["y"]
        load_splits(DataArguments("owner/name", dataset_config="en", dataset_test_split="test"), "steps", False)
        assert asked[1:] == [("owner/name", "en", "train"), ("owner/name", "en", "test")]
