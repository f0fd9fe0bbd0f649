"""Data files for `fuzzing.py`, most of them broken, read as the subcommands read them."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from fuzz_input import Input, command, dump_json, spoil_bytes, spoil_file, spoil_tree, wild

from minillm_trl.data import load_corpus, load_examples
from minillm_trl.data.templates import is_empty

_USER = {"role": "user", "content": "What is a mill?"}
_ANSWER = {"role": "assistant", "content": "It grinds."}
_ROWS: dict[str, list[dict[str, Any]]] = {
    "examples": [
        {"prompt": "a mill is", "completion": "a place to grind"},
        {"prompt": "a pub is", "completion": None},
        {"prompt": "the city", "completion": "is large", "references": ["is large", "is old"], "id": 3},
        {"prompt": [_USER], "completion": [_ANSWER]},
        {"messages": [{"role": "system", "content": "Be brief."}, _USER, _ANSWER], "source": "x"},
    ],
    "instructions": [
        {"instruction": "Name a mill.", "context": "", "response": "The Mill", "category": "open_qa"},
        {"instruction": "Name a pub.", "input": "in the city", "output": "The Pub"},
        {"instruction": "Say it.", "instances": [{"input": "x", "output": "it"}, {"input": "", "output": "that"}]},
        {"instruction": "Say so.", "input": "y", "output": ["so", "thus"], "task": "t1"},
    ],
    "text": [{"text": "the mill"}, {"text": ""}, {"text": "the pub"}],
    "vicuna": [{"question_id": 1, "turns": ["Who?"], "category": "generic"}],
}
_ROWS["dolly"] = _ROWS["unni"] = _ROWS["selfinst"] = _ROWS["sni"] = _ROWS["instructions"]


def _rows(random: Random, task: str) -> list[Any]:
    chosen = random.choice(_ROWS[task])
    rows = [json.loads(json.dumps(chosen)) for _ in range(random.randrange(1, 5))]
    for number, row in enumerate(rows):
        name = next(iter(row))
        row[name] = f"{row[name]} {number}" if isinstance(row[name], str) else row[name]
    if random.random() < 0.7:
        number = random.randrange(len(rows))
        rows[number] = spoil_tree(random, rows[number])
    return rows


def _write_rows(random: Random, folder: Path, rows: list[Any], stem: str = "train") -> Path:
    """Write the rows in one of the formats, sometimes with broken bytes."""
    extension = random.choice((".jsonl",) * 4 + (".json", ".csv", ".jsonl.gz", ".parquet", ".txt", ".JSON"))
    match extension:
        case ".json" | ".JSON":
            data = dump_json(random, rows if random.random() < 0.9 else {"data": rows})
        case ".csv":
            data = _csv(rows)
        case ".parquet":
            data = _parquet(random, rows)
        case ".txt":
            data = "\n".join(str(row) for row in rows).encode("utf-8", errors="replace")
        case _:
            data = b"\n".join(dump_json(random, row) for row in rows) + random.choice((b"\n", b"", b"\n\n \n"))
    data = gzip.compress(data) if extension.endswith(".gz") and random.random() < 0.9 else data
    for _ in range(random.choice((0, 0, 0, 0, 1, 1, 2))):
        data = spoil_bytes(random, data)
    path = folder / f"{stem}{extension}"
    if random.random() < 0.01:
        path.mkdir()
    else:
        path.write_bytes(data)
    return path


def _csv(rows: list[Any]) -> bytes:
    text, rows = io.StringIO(), [row for row in rows if isinstance(row, dict)]
    writer = csv.writer(text)
    names = list(rows[0]) if rows else []
    writer.writerow(names)
    writer.writerows([row.get(name) for name in names] for row in rows)
    return text.getvalue().encode("utf-8", errors="replace")


def _parquet(random: Random, rows: list[Any]) -> bytes:
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        table = pa.table({"prompt": [b"\xff\xfe"], "completion": [{"a": [1]}]})
    if random.random() < 0.4 and table.num_columns:
        types = (pa.binary(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.null(), pa.int8())
        types += (pa.timestamp("ns"), pa.list_(pa.string(), 2), pa.decimal128(5), pa.map_(pa.string(), pa.string()))
        values = [wild(random) if random.random() < 0.5 else None for _ in range(table.num_rows)]
        try:
            column = pa.array(values, random.choice(types))
        except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
            column = pa.array([b"\xff"] * table.num_rows, pa.binary())
        number = random.randrange(table.num_columns)
        table = table.set_column(number, table.column_names[number], column)
    file = io.BytesIO()
    try:
        pyarrow.parquet.write_table(table, file)
    except pa.ArrowException:  # an empty struct cannot be written
        pyarrow.parquet.write_table(pa.table({"prompt": ["x"], "completion": ["y"]}), file)
    return file.getvalue()


# What was accepted must be sound


def check_examples(dataset: Dataset) -> None:
    for row in dataset:
        assert not is_empty(row["prompt"]), row
        assert isinstance(row["prompt"], str | list), row
        assert isinstance(row.get("completion"), str | list | None), row
        json.dumps([row["prompt"], row.get("completion"), row.get("references")], ensure_ascii=False).encode()
        assert all(isinstance(each, str) and each.strip() for each in row.get("references") or ()), row


def _check_prepared(folder: Path) -> Callable[[Any], None]:
    def check(status: int) -> None:
        assert status == 0
        record = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        kept = sum(each["rows"] for each in record["splits"].values())
        assert kept + sum(record["dropped"].values()) == record["rows_read"], record
        for split in record["splits"]:
            if record["settings"]["task"] == "text":
                assert len(load_corpus(folder / f"{split}.jsonl")) == record["splits"][split]["rows"]
            else:
                rows = load_examples(folder / f"{split}.jsonl")
                assert len(rows) == record["splits"][split]["rows"]
                check_examples(rows)

    return check


def data_file(random: Random, folder: Path) -> Input:
    """Make a file of examples, read as the training subcommands do."""
    path = _write_rows(random, folder, _rows(random, random.choice(("examples",) * 9 + ("instructions",))))
    options: dict[str, Any] = {"require_completion": random.random() < 0.3}
    if random.random() < 0.1:
        options |= {random.choice(("prompt_column", "references_column")): random.choice(("prompt", "id", "x"))}
    if random.random() < 0.1:
        options["max_rows"] = random.choice((1, 2, 100))

    def check(dataset: Dataset) -> None:
        check_examples(dataset)
        if path.suffix == ".jsonl":
            lines = [
                line for line in path.read_bytes().split(b"\n") if line.decode("utf-8-sig", errors="replace").strip()
            ]
            assert len(dataset) == min(len(lines), options.get("max_rows", len(lines))), (len(dataset), len(lines))

    return Input(lambda: load_examples(path, **options), (path,), check)


def corpus(random: Random, folder: Path) -> Input:
    """Make a corpus of plain text."""
    path = _write_rows(random, folder, _rows(random, random.choice(("text", "text", "examples"))))

    def check(dataset: Dataset) -> None:
        for row in dataset:
            assert row["text"] if "text" in row else row["completion"], row

    return Input(lambda: load_corpus(path), (path,), check)


def prepared_data(random: Random, folder: Path) -> Input:
    """Make a source for `prepare-data`, for any task."""
    task = random.choice([name for name in _ROWS if name != "vicuna"])
    source = _write_rows(random, folder, _rows(random, task))
    output = folder / "out"
    words: list[object] = ["prepare-data", "--task", task, "--source", source, "--output_dir", output]
    if task == "dolly":
        words += ["--validation_rows", random.choice((0, 0, 1)), "--test_rows", random.choice((0, 0, 1, 9))]
    if random.random() < 0.15:
        words += random.choice((["--max_rows", 1], ["--template", "chat"], ["--prompt_column", "id"], ["--seed", -1]))
    return command(
        *words, names=(source, *(str(word).lstrip("-") for word in words[7:])), check=_check_prepared(output)
    )


def vicuna(random: Random, folder: Path) -> Input:
    """Make questions and answers of the Vicuna benchmark."""
    answers = (
        [{"question_id": 1, "text": "He."}]
        if random.random() < 0.5
        else [{"question_id": 1, "choices": [{"index": 0, "turns": ["He.", "She."]}]}]
    )
    if random.random() < 0.6:
        answers = [spoil_tree(random, each) for each in answers]
    source = _write_rows(random, folder, _rows(random, "vicuna"), "question")
    answer = _write_rows(random, folder, answers, "answer")
    output = folder / "out"
    words = ("prepare-data", "--task", "vicuna", "--source", source, "--answers", answer, "--output_dir", output)
    return command(*words, names=(source, answer), check=_check_prepared(output))


def natural_instructions(random: Random, folder: Path) -> Input:
    """Make a clone of Super-NaturalInstructions."""
    clone, output = folder / "sni", folder / "out"
    tasks, listed = clone / "tasks" / "task1.json", clone / "splits" / "default" / "test_tasks.txt"
    for path in (tasks, listed):
        path.parent.mkdir(parents=True)
    task = {"Definition": ["Say it."], "Instances": [{"input": "x", "output": ["y"]}, {"input": "z", "output": ["w"]}]}
    data = dump_json(random, spoil_tree(random, task) if random.random() < 0.8 else task)
    tasks.write_bytes(spoil_bytes(random, data) if random.random() < 0.4 else data)
    listed.write_bytes(spoil_bytes(random, b"task1\n") if random.random() < 0.2 else b"task1\n")
    words = ("prepare-data", "--task", "sni", "--source", clone, "--output_dir", output)
    return command(*words, names=(clone,), check=_check_prepared(output))


def saved_dataset(random: Random, folder: Path) -> Input:
    """Make a folder of `save_to_disk` with one broken file."""
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    path = folder / "saved"
    (DatasetDict({"train": dataset}) if random.random() < 0.5 else dataset).save_to_disk(path)
    spoil_file(random, [each for each in path.rglob("*") if each.is_file()])
    return Input(lambda: load_examples(path), (path,), check_examples)
