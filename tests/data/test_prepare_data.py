"""Preparing data: the published formats, the wrapper, filters and splits, what is written, and what is refused."""

import json
from pathlib import Path

import pytest
from conftest import build_tokenizer
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from minillm_trl.cli import main
from minillm_trl.data import load_corpus, load_examples
from minillm_trl.data.prepare import token_counter
from minillm_trl.data.templates import format_instruction

DOLLY = Path(__file__).parents[1] / "data" / "dolly" / "databricks-dolly-excerpt.jsonl"


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(folder: Path, task: str, source: str | Path | None, *options: str) -> dict[str, list[dict]]:
    """Run the command; the rows by split."""
    arguments = ["--task", task, "--output_dir", str(folder), *options]
    assert main(["prepare-data", *arguments, *(["--source", str(source)] if source else [])]) == 0
    return read(folder)


def read(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: [json.loads(line) for line in path.open()] for path in sorted(folder.glob("*.jsonl"))}


def refused(capsys, folder: Path, *options: str) -> str:
    assert main(["prepare-data", "--output_dir", str(folder), *options]) == 2
    return capsys.readouterr().err


def dropped(folder: Path) -> dict[str, int]:
    return json.loads((folder / "statistics.json").read_text())["dropped"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return str(folder)


class TestWrapper:
    def test_text_of_the_papers_code(self):
        assert format_instruction("Name a colour.") == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nName a colour.\n\n### Response:\n"
        )
        assert format_instruction("Is it {red}?", "The sky.") == (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nIs it {red}?\n\n### Input:\n"
            "The sky.\n\n### Response:\n"
        )


class TestDolly:
    def test_the_first_kept_rows_are_the_test_set_and_the_next_the_validation_set(self, tmp_path, tokenizer_dir):
        rows = [json.loads(line) for line in DOLLY.open()]
        limit = 700
        tokenizer = build_tokenizer()
        kept = []
        for number, row in enumerate(rows):
            prompt = format_instruction(row["instruction"], row["context"])
            if len(tokenizer(prompt)["input_ids"]) <= limit:
                kept.append((number, prompt, row["response"]))
        assert 150 < len(kept) < len(rows)
        sizes = ("--test_rows", "20", "--validation_rows", "30")
        limits = ("--tokenizer", tokenizer_dir, "--max_prompt_length", str(limit))
        parts = prepare(tmp_path / "dolly", "dolly", DOLLY, *sizes, *limits)
        for split, start, stop in (("test", 0, 20), ("validation", 20, 50), ("train", 50, None)):
            found = [(row["row"], row["prompt"], row["completion"]) for row in parts[split]]
            assert found == kept[start:stop], split
        assert {row["references"][0] for row in parts["test"]} == {row["completion"] for row in parts["test"]}
        assert load_examples(tmp_path / "dolly", split="validation")["prompt"][:] == [row[1] for row in kept[20:50]]
        statistics = json.loads((tmp_path / "dolly" / "statistics.json").read_text())
        assert statistics["rows_read"] == len(rows)
        assert statistics["dropped"] == {f"prompt has more than {limit} tokens": len(rows) - len(kept)}
        lengths = [len(tokenizer(row[1])["input_ids"]) for row in kept[:20]]
        prompts = statistics["splits"]["test"]["prompt_length"]
        assert (prompts["0%"], prompts["100%"]) == (min(lengths), max(lengths))

    def test_prompts_are_in_one_part_only_and_repeated_rows_are_dropped(self, tmp_path):
        def row(instruction: str, response: str) -> dict:
            return {"instruction": instruction, "context": "", "response": response, "category": "qa"}

        source = write(
            tmp_path / "d.jsonl",
            *(row("a", "1"), row("b", "1"), row("a", "2"), row("a", "1"), row("b", "2"), row("c", " "), row("c", "1")),
        )
        parts = prepare(tmp_path / "out", "dolly", source, "--test_rows", "1", "--validation_rows", "1")
        shown = {split: [(row["instruction"], row["completion"]) for row in rows] for split, rows in parts.items()}
        assert shown == {"test": [("a", "1")], "validation": [("b", "1")], "train": [("c", "1")]}
        statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
        assert statistics["dropped"] == {
            "repeats an earlier row": 1,
            "completion is empty": 1,
            "train: its prompt is in test": 1,
            "train: its prompt is in validation": 1,
        }

    def test_categories_and_context_are_selected(self, tmp_path):
        def row(number: int, category: str, context: str) -> dict:
            return {"instruction": f"q{number}", "context": context, "response": "a", "category": category}

        kinds = [("closed_qa", "c"), ("closed_qa", ""), ("summarization", "c"), ("open_qa", ""), ("open_qa", " ")]
        source = write(tmp_path / "d.jsonl", *(row(number, *kind) for number, kind in enumerate(kinds)))

        def chosen(name: str, *options: str) -> tuple[list[str], dict[str, int]]:
            rows = prepare(tmp_path / name, "instructions", source, *options)["train"]
            return sorted(row["instruction"] for row in rows), dropped(tmp_path / name)

        both = ("--categories", "closed_qa", "summarization")
        assert chosen("both", *both) == (["q0", "q1", "q2"], {"category is another": 2})
        assert chosen("with", *both, "--context", "with") == (
            ["q0", "q2"],
            {"category is another": 2, "has no context": 1},
        )
        assert chosen("without", "--context", "without") == (["q1", "q3", "q4"], {"has a context": 2})

    def test_category_that_no_row_has_is_refused(self, tmp_path, capsys):
        source = write(tmp_path / "d.jsonl", {"instruction": "q", "response": "a", "category": "closed_qa"})
        error = refused(capsys, tmp_path / "out", "--task", "dolly", "--source", source, "--categories", "closed-qa")
        assert "d.jsonl: no row has the category 'closed-qa'; the categories are 'closed_qa'" in error

    def test_conversations_for_chat_models(self, tmp_path):
        source = write(tmp_path / "d.jsonl", {"instruction": "Sum up.", "context": "A text.", "response": "B."})
        options = ("--test_rows", "0", "--validation_rows", "0", "--template", "chat")
        parts = prepare(tmp_path / "out", "dolly", source, *options)
        assert parts["train"][0]["prompt"] == [{"role": "user", "content": "Sum up.\n\nA text."}]
        assert parts["train"][0]["completion"] == [{"role": "assistant", "content": "B."}]


class TestPublishedFormats:
    def test_selfinst(self, tmp_path):
        instances = [{"input": "x", "output": "1"}, {"input": "", "output": "2"}]
        source = write(tmp_path / "s.jsonl", {"id": "0", "instruction": "Add.", "instances": instances})
        rows = prepare(tmp_path / "out", "selfinst", source)["test"]
        assert [(row["input"], row["references"], row["row"]) for row in rows] == [("x", ["1"], 0), ("", ["2"], 0)]
        assert rows[1]["prompt"] == format_instruction("Add.")

    def test_vicuna_joins_questions_and_answers_by_number_or_text(self, tmp_path):
        questions = write(
            tmp_path / "q.jsonl",
            {"question_id": 2, "category": "writing", "turns": ["Write."]},
            {"question_id": 1, "category": "generic", "turns": ["Why?", "And then?"]},
        )
        answers = write(
            tmp_path / "a.jsonl",
            {"question_id": "1", "text": "Because."},
            {"question_id": "2", "choices": [{"index": 0, "turns": ["A text."]}]},
        )
        rows = prepare(tmp_path / "out", "vicuna", questions, "--answers", answers)["test"]
        shown = [(row["instruction"], row["references"], row["category"]) for row in rows]
        assert shown == [("Write.", ["A text."], "writing"), ("Why?", ["Because."], "generic")]

    def test_natural_instructions_from_the_repository(self, tmp_path, tokenizer_dir):
        repository = tmp_path / "natural-instructions"
        (repository / "tasks").mkdir(parents=True)
        (repository / "splits" / "default").mkdir(parents=True)
        (repository / "splits" / "default" / "test_tasks.txt").write_text("task2_b\ntask1_a\n")
        long = "the punter serves italian food near the river"
        for name in ("task1_a", "task2_b", "task3_c"):
            instances = [{"id": str(i), "input": f"{name} {i}", "output": [long, "no"]} for i in range(3)]
            instances[0]["output"] = ["no"]
            task = {"Definition": [f"Do {name}."], "Positive Examples": [], "Instances": instances}
            (repository / "tasks" / f"{name}.json").write_text(json.dumps(task))
        options = ("--instances_per_task", "2", "--tokenizer", tokenizer_dir, "--min_reference_length", "5")
        rows = prepare(tmp_path / "out", "sni", repository, *options)["test"]
        assert [(row["category"], row["input"]) for row in rows] == [
            ("task2_b", "task2_b 1"),
            ("task1_a", "task1_a 1"),
        ]
        assert rows[0]["instruction"] == "Do task2_b."
        assert rows[0]["references"] == [long, "no"]

    def test_an_empty_answer_among_others_is_left_out_and_an_empty_first_one_drops_the_row(self, tmp_path):
        outputs = (["x", "", "y"], ["", "z"])
        rows = [{"instruction": f"Say {i}.", "input": "", "output": output} for i, output in enumerate(outputs)]
        kept = prepare(tmp_path / "out", "sni", write(tmp_path / "s.jsonl", *rows))["test"]
        assert [row["references"] for row in kept] == [["x", "y"]]
        assert load_examples(tmp_path / "out", split="test")["references"][:] == [["x", "y"]]
        assert dropped(tmp_path / "out") == {"completion is empty": 1}

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ([], "is [], "),
            ({"Definition": [], "Instances": []}, "field 'Definition' is []"),
            ({"Definition": [5], "Instances": []}, "field 'Definition' is [5]"),
            ({"Definition": [""], "Instances": []}, "field 'Definition' is ['']"),
            ({"Definition": "Do.", "Instances": None}, "field 'Instances' is None"),
            ({"Definition": "Do.", "Instances": []}, "field 'Instances' is []"),
            ({"Definition": "Do.", "Instances": [{"output": "x"}]}, "number 0 (counting from 0) is {'output': 'x'}"),
            ({"Definition": "Do.", "Instances": [{"input": "\ud83d", "output": "x"}]}, "half a surrogate"),
        ],
    )
    def test_damaged_task_of_natural_instructions_is_named(self, tmp_path, capsys, task, message):
        (tmp_path / "ni" / "tasks").mkdir(parents=True)
        (tmp_path / "ni" / "splits" / "default").mkdir(parents=True)
        (tmp_path / "ni" / "splits" / "default" / "test_tasks.txt").write_text("task1_a\n")
        path = tmp_path / "ni" / "tasks" / "task1_a.json"
        path.write_text(json.dumps(task))
        error = refused(capsys, tmp_path / "out", "--task", "sni", "--source", str(tmp_path / "ni"))
        assert f"{path}: " in error
        assert message in error

    @pytest.mark.parametrize("choices", [[{}], [{"turns": []}], [{"turns": [3]}], [3], "x", []])
    def test_vicunas_damaged_choices_are_named(self, tmp_path, capsys, choices):
        questions = write(tmp_path / "q.jsonl", {"question_id": 1, "turns": ["Why?"]})
        answers = write(tmp_path / "a.jsonl", {"question_id": 1, "choices": choices})
        options = ("--task", "vicuna", "--source", questions, "--answers", answers)
        assert f"a.jsonl:1: field 'choices' is {choices!r}" in refused(capsys, tmp_path / "out", *options)

    def test_natural_instructions_as_a_flat_table(self, tmp_path):
        row = {"topic": "task1", "instruction": "Say.", "input": "x", "output": ["1", "2"]}
        rows = prepare(tmp_path / "out", "sni", write(tmp_path / "s.jsonl", row))["test"]
        assert (rows[0]["category"], rows[0]["references"]) == ("task1", ["1", "2"])

    def test_unnatural_instructions_and_a_sample_that_its_seed_determines(self, tmp_path):
        published = [
            {
                "instruction": f"Do {i}.",
                "instances": [
                    {"instruction_with_input": f"Do {i}. x", "input": "x", "constraints": "None.", "output": f"{i}"}
                ],
            }
            for i in range(40)
        ]
        source = write(tmp_path / "core_data.jsonl", *published)
        first = prepare(tmp_path / "a", "unni", source, "--max_rows", "10")["test"]
        again = prepare(tmp_path / "b", "unni", source, "--max_rows", "10")["test"]
        other = prepare(tmp_path / "c", "unni", source, "--max_rows", "10", "--seed", "1")["test"]
        assert first == again
        assert len(first) == 10
        assert [row["row"] for row in first] == sorted(row["row"] for row in first)
        assert first != other
        assert first[0]["references"] == [str(first[0]["row"])]


class TestYourOwnData:
    def test_instructions_in_alpacas_columns(self, tmp_path):
        source = write(
            tmp_path / "a.jsonl", *({"instruction": f"Q{i}", "input": "", "output": f"{i}"} for i in range(9))
        )
        parts = prepare(tmp_path / "out", "instructions", source, "--validation_rows", "3")
        assert (len(parts["train"]), len(parts["validation"])) == (6, 3)

    def test_the_split_of_a_prompt_does_not_depend_on_the_order_of_the_file(self, tmp_path):
        rows = [{"prompt": f"p{i % 20}", "completion": f"{i}"} for i in range(60)]
        options = ("--test_rows", "12", "--validation_rows", "12")
        first = prepare(tmp_path / "a", "examples", write(tmp_path / "a.jsonl", *rows), *options)
        second = prepare(tmp_path / "b", "examples", write(tmp_path / "b.jsonl", *reversed(rows)), *options)
        for split in ("train", "validation", "test"):
            assert {row["prompt"] for row in first[split]} == {row["prompt"] for row in second[split]}
        assert not {row["prompt"] for row in first["train"]} & {row["prompt"] for row in first["test"]}
        assert len(first["test"]) == 12

    def test_messages_become_prompt_and_completion(self, tmp_path):
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        messages = [{"role": role, "content": content} for role, content in turns]
        parts = prepare(tmp_path / "out", "examples", write(tmp_path / "m.jsonl", {"messages": messages}))
        assert parts["train"] == [{"prompt": messages[:3], "completion": messages[3:], "references": ["d"]}]

    def test_plain_text_for_the_language_modelling_loss(self, tmp_path):
        path = tmp_path / "corpus.txt"
        path.write_text("one text\nanother\none text\n")
        parts = prepare(tmp_path / "out", "text", path)
        assert parts["train"] == [{"text": "one text"}, {"text": "another"}]
        assert load_corpus(tmp_path / "out")["text"][:] == ["one text", "another"]

    def test_rows_that_are_too_long_in_all_are_dropped_with_the_end_of_sequence_counted(self, tmp_path, tokenizer_dir):
        tokenizer = build_tokenizer()
        rows = [{"prompt": "the mill", "completion": " near the river" * i} for i in (1, 2, 3)]
        whole = [len(tokenizer(r["prompt"])["input_ids"]) + len(tokenizer(r["completion"])["input_ids"]) for r in rows]
        source = write(tmp_path / "a.jsonl", *rows)
        options = ("--tokenizer", tokenizer_dir, "--max_length", str(whole[1] + 1))
        assert len(prepare(tmp_path / "fits", "examples", source, *options)["train"]) == 2
        options = ("--tokenizer", tokenizer_dir, "--max_length", str(whole[1]))
        assert len(prepare(tmp_path / "tight", "examples", source, *options)["train"]) == 1

    def test_answers_are_measured_without_the_special_tokens_that_prompts_have(self, tmp_path):
        tokenizer = build_tokenizer()
        first = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = first
        tokenizer.save_pretrained(tmp_path / "bos")
        answer = "the punter serves italian food near the river"
        count = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        length = token_counter(tokenizer)
        assert (length(answer), length(answer, is_answer=True)) == (count + 1, count)
        assert length([{"role": "assistant", "content": answer}], is_answer=True) == count
        rows = [{"prompt": "p", "completion": answer}, {"prompt": "q", "completion": f"{answer} river"}]
        options = ("--tokenizer", str(tmp_path / "bos"), "--min_reference_length", str(count + 1))
        parts = prepare(tmp_path / "out", "examples", write(tmp_path / "a.jsonl", *rows), *options)
        assert [row["prompt"] for row in parts["train"]] == ["q"]
        statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())["splits"]["train"]
        assert statistics["completion_length"]["100%"] == length(rows[1]["completion"], is_answer=True)
        assert statistics["prompt_length"]["100%"] == 2

    def test_empty_completions_are_dropped_and_counted_in_every_form(self, tmp_path):
        rows = [{"prompt": f"p{i}", "completion": answer} for i, answer in enumerate(("c", "", " \n"))]
        prepare(tmp_path / "text", "examples", write(tmp_path / "a.jsonl", *rows))
        turns = [[("user", "a"), ("assistant", answer)] for answer in ("b", "")]
        messages = [[{"role": role, "content": content} for role, content in conversation] for conversation in turns]
        prepare(
            tmp_path / "chat", "examples", write(tmp_path / "m.jsonl", *({"messages": turns} for turns in messages))
        )
        assert [row["completion"] for row in read(tmp_path / "text")["train"]] == ["c"]
        assert [row["prompt"] for row in read(tmp_path / "chat")["train"]] == [messages[0][:1]]
        assert dropped(tmp_path / "text") == {"completion is empty": 2}
        assert dropped(tmp_path / "chat") == {"completion is empty": 1}

    def test_prompts_alone_may_have_null_for_completion(self, tmp_path):
        source = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": None, "id": 1})
        assert prepare(tmp_path / "out", "examples", source)["train"] == [{"prompt": "p", "id": 1}]
        assert load_examples(tmp_path / "out").column_names == ["prompt", "id"]

    def test_a_column_of_that_name_is_no_text_beside_prompts(self, tmp_path):
        source = write(tmp_path / "a.jsonl", {"prompt": "p", "text": 3})
        assert prepare(tmp_path / "out", "examples", source)["train"] == [{"prompt": "p", "text": 3}]
        assert "text_length" not in (tmp_path / "out" / "statistics.json").read_text()

    def test_columns_with_other_names(self, tmp_path):
        source = write(tmp_path / "a.jsonl", {"q": "p", "a": "c", "refs": ["c", "d"]})
        options = ("--prompt_column", "q", "--completion_column", "a", "--references_column", "refs")
        parts = prepare(tmp_path / "examples", "examples", source, *options)
        assert parts["train"] == [{"prompt": "p", "completion": "c", "references": ["c", "d"]}]
        parts = prepare(tmp_path / "text", "text", source, "--text_column", "a")
        assert parts["train"] == [{"text": "c"}]

    def test_text_in_a_folder(self, tmp_path):
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "train.txt").write_text("one text\nanother\n")
        parts = prepare(tmp_path / "out", "text", tmp_path / "corpus")
        assert parts["train"] == [{"text": "one text"}, {"text": "another"}]

    def test_null_fields_that_arrow_adds_to_messages_are_not_taken_for_tools(self, tmp_path):
        tool_fields = {"tool_calls": None, "tool_call_id": None}
        turns = [{"role": role, "content": "x", **tool_fields} for role in ("user", "assistant")]
        parts = prepare(tmp_path / "out", "examples", write(tmp_path / "m.jsonl", {"messages": turns, "tools": None}))
        assert parts["train"][0]["prompt"] == [{"role": "user", "content": "x"}]

    def test_parts_that_end_up_empty_are_refused(self, tmp_path, capsys):
        source = write(tmp_path / "a.jsonl", *({"prompt": "p", "completion": f"{i}"} for i in range(4)))
        options = ("--task", "examples", "--source", source, "--test_rows", "1")
        assert "The split 'train' is empty" in refused(capsys, tmp_path / "out", *options)
        options = (*options, "--validation_rows", "1")
        assert "The split 'validation' is empty" in refused(capsys, tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()

    def test_values_that_json_cannot_hold_are_named(self, tmp_path, capsys):
        Dataset.from_dict({"prompt": ["p"], "raw": [b"x"]}).to_parquet(tmp_path / "a.parquet")
        error = refused(capsys, tmp_path / "out", "--task", "examples", "--source", str(tmp_path / "a.parquet"))
        assert "Field 'raw' is b'x', which JSON cannot hold" in error


class TestFolders:
    def rows(self, tmp_path: Path) -> str:
        return write(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(5)))

    def test_a_second_run_leaves_what_is_there(self, tmp_path, capsys):
        source = self.rows(tmp_path)
        prepare(tmp_path / "out", "examples", source)
        before = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
        prepare(tmp_path / "out", "examples", source)
        assert "is up to date" in capsys.readouterr().out
        assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == before

    def test_other_settings_and_changed_files_are_refused_until_told_to_overwrite(self, tmp_path, capsys):
        source = self.rows(tmp_path)
        prepare(tmp_path / "out", "examples", source)
        options = ("--task", "examples", "--source", source)
        error = refused(capsys, tmp_path / "out", *options, "--validation_rows", "2")
        assert "validation_rows=0, now it is 2" in error
        write(Path(source), {"prompt": "p", "completion": "c"})
        assert "sha256" in refused(capsys, tmp_path / "out", *options)
        assert len(prepare(tmp_path / "out", "examples", source, "--overwrite", "true")["train"]) == 1

    @pytest.mark.parametrize("kind", ["home", "folder", "saved", "clone", "text"])
    def test_changed_sources_of_every_kind_are_noticed(self, tmp_path, capsys, monkeypatch, kind):
        monkeypatch.setenv("HOME", str(tmp_path))
        folder, source, task = tmp_path / "source", str(tmp_path / "source"), "examples"
        folder.mkdir()

        def fill(answer: str) -> None:
            if kind == "saved":
                Dataset.from_dict({"prompt": ["p"], "completion": [answer]}).save_to_disk(folder)
            elif kind == "text":
                (folder / "train.txt").write_text(answer)
            elif kind == "clone":
                (folder / "tasks").mkdir(exist_ok=True)
                (folder / "splits" / "default").mkdir(parents=True, exist_ok=True)
                (folder / "splits" / "default" / "test_tasks.txt").write_text("task1_a\n")
                content = {"Definition": "Do.", "Instances": [{"input": "x", "output": answer}]}
                (folder / "tasks" / "task1_a.json").write_text(json.dumps(content))
            else:
                write(folder / "train.jsonl", {"prompt": "p", "completion": answer})

        if kind == "home":
            source = "~/source/train.jsonl"
        task = {"clone": "sni", "text": "text"}.get(kind, "examples")
        fill("one")
        prepare(tmp_path / "out", task, source)
        prepare(tmp_path / "out", task, source)
        assert "is up to date" in capsys.readouterr().out
        fill("two")
        assert "prepared with sha256=" in refused(capsys, tmp_path / "out", "--task", task, "--source", source)

    def test_files_that_are_not_read_do_not_count_as_a_change(self, tmp_path, capsys):
        (tmp_path / "source").mkdir()
        write(tmp_path / "source" / "train.jsonl", {"prompt": "p", "completion": "c"})
        prepare(tmp_path / "out", "examples", tmp_path / "source")
        write(tmp_path / "source" / "test.jsonl", {"prompt": "q", "completion": "c"})
        prepare(tmp_path / "out", "examples", tmp_path / "source")
        assert "is up to date" in capsys.readouterr().out

    def test_a_part_that_is_missing_is_written_again(self, tmp_path, capsys):
        source = self.rows(tmp_path)
        parts = prepare(tmp_path / "out", "examples", source, "--test_rows", "2")
        (tmp_path / "out" / "test.jsonl").unlink()
        assert prepare(tmp_path / "out", "examples", source, "--test_rows", "2") == parts
        assert "'test.jsonl' is missing" in capsys.readouterr().err

    def test_files_of_others_are_not_deleted(self, tmp_path, capsys):
        source = self.rows(tmp_path)
        prepare(tmp_path / "out", "examples", source)
        (tmp_path / "out" / "notes.md").write_text("mine")
        options = ("--task", "examples", "--source", source, "--validation_rows", "2", "--overwrite", "true")
        assert "did not write 'notes.md'" in refused(capsys, tmp_path / "out", *options)
        assert (tmp_path / "out" / "notes.md").exists()
        (tmp_path / "out" / "notes.md").rename(tmp_path / "notes.md")
        (tmp_path / "out" / "stage.json").write_text("{}")  # of a recipe
        assert main(["prepare-data", "--output_dir", str(tmp_path / "out"), *options]) == 0

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}}'])
    def test_statistics_of_something_else_are_refused(self, tmp_path, capsys, content):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "statistics.json").write_text(content)
        error = refused(capsys, tmp_path / "out", "--task", "examples", "--source", self.rows(tmp_path))
        assert f"{tmp_path / 'out' / 'statistics.json'}: " in error
        assert "Name another output_dir" in error

    def test_folders_with_other_files_are_not_touched(self, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        options = ("--task", "examples", "--source", self.rows(tmp_path), "--overwrite", "true")
        assert "holds other files" in refused(capsys, tmp_path / "mine", *options)
        assert (tmp_path / "mine" / "thesis.txt").exists()

    def test_options_come_from_a_yaml_whose_unknown_keys_are_refused(self, tmp_path, capsys):
        config = tmp_path / "c.yaml"
        config.write_text(f"task: examples\nsource: {self.rows(tmp_path)}\noutput_dir: {tmp_path / 'out'}\nrows: 3\n")
        assert main(["prepare-data", "--config", str(config)]) == 2
        assert "c.yaml:4: unknown option 'rows'" in capsys.readouterr().err
        config.write_text(config.read_text().replace("rows: 3", "max_rows: 3"))
        assert main(["prepare-data", "--config", str(config)]) == 0
        assert len(read(tmp_path / "out")["train"]) == 3


def test_conversations_cannot_be_measured_without_a_chat_template(tmp_path, model_dir, capsys):
    source = write(tmp_path / "d.jsonl", *conversations("user", "assistant"))
    arguments = ("--task", "examples", "--source", source, "--output_dir", str(tmp_path / "out"))
    assert main(["prepare-data", *arguments, "--tokenizer", model_dir("gpt2")]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def conversations(*roles: str, user: str = "u", **fields: object) -> list[dict]:
    """A good row, and one with these roles; `fields` are of its messages."""
    good = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    bad = [{"role": role, "content": user if role == "user" else "a", **fields} for role in roles]
    return [{"messages": good}, {"messages": bad}]


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([{"instruction": "a", "response": 3}], "dolly", "d.jsonl:1: field 'response' is 3"),
        ([{"instruction": "a", "response": "b"}, {"instruction": "", "response": "b"}], "dolly", "d.jsonl:2: field"),
        ([{"question": "a"}], "instructions", "no column 'instruction'"),
        ([{"instruction": "a"}], "instructions", "no column with the answers"),
        ([{"instruction": "a", "instances": "b"}], "unni", "d.jsonl:1: field 'instances' is 'b'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "examples", "d.jsonl:1: field 'messages' has the roles"),
        ([{"instruction": "a", "response": "b"}], "dolly", "1 rows remain"),
        (
            [{"instruction": "a", "instances": []}] * 2,
            "unni",
            "d.jsonl: the field 'instances' is an empty list in all",
        ),
        ([{"instruction": "b\ud83d", "response": "b"}], "dolly", "d.jsonl:1: field 'instruction' is 'b\\ud83d'"),
        ([{"text": "b\ud83d"}], "text", "d.jsonl:1: field 'text' is 'b\\ud83d', which has half a surrogate pair"),
        ([{"messages": 5}], "examples", "d.jsonl:1: field 'messages' is 5"),
        (
            conversations("user", "assistant", content=None),
            "examples",
            "d.jsonl:2: field 'messages' ends with {'role'",
        ),
        (conversations("user", "human", "assistant"), "examples", "message 1 (counting from 0) has the role 'human'"),
        (conversations("user", "assistant", "assistant"), "examples", "ends with two assistant messages"),
        (conversations("system", "assistant"), "examples", "d.jsonl:2: field 'messages' has no user message"),
        (
            conversations("user", "assistant", user=" "),
            "examples",
            "message 0 (counting from 0) is the user's and empty",
        ),
        (
            conversations("user", "assistant", tool_calls=[{"name": "f"}]),
            "examples",
            "d.jsonl:2: field 'messages', message 0 (counting from 0) has 'tool_calls'",
        ),
        (
            [{"prompt": [{"role": "user", "content": "a", "tool_call_id": "1"}]}],
            "examples",
            "d.jsonl:1: field 'prompt', message 0 (counting from 0) has 'tool_call_id'",
        ),
        ([{"prompt": "a", "tools": ["f"]}], "examples", "d.jsonl:1: field 'tools' is ['f']. Tools are not supported"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": None}],
            "examples",
            "d.jsonl:2: field 'completion' is missing or null",
        ),
        ([{"prompt": "a", "completion": "b"}], "text", "d.jsonl: has no column 'text', but prompts and completions"),
    ],
)
def test_bad_rows_are_refused_by_file_line_and_field(tmp_path, capsys, rows, task, message):
    error = refused(capsys, tmp_path / "out", "--task", task, "--source", write(tmp_path / "d.jsonl", *rows))
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "doly"), "Did you mean 'dolly'?"),
        (("--task", "unni"), "needs source"),
        (("--task", "unni", "--source", "x", "--test_rows", "5"), "test_rows has no meaning for unni"),
        (("--task", "dolly", "--max_prompt_length", "256"), "set tokenizer"),
        (("--task", "vicuna", "--source", "x"), "answers is the file"),
        (("--task", "text", "--source", "x", "--validation_rows", "1"), "validation_rows has no meaning for text"),
        (("--task", "text", "--source", "x", "--max_length", "9"), "max_length has no meaning for text"),
        (("--task", "text", "--source", "x", "--template", "alpaca"), "template has no meaning for text"),
        (
            ("--task", "examples", "--source", "x", "--chat_template_kwargs", "{}"),
            "conversations in tokens: set tokenizer",
        ),
        (("--task", "dolly", "--instances_per_task", "100"), "instances_per_task has no meaning for dolly"),
        (("--task", "sni", "--source", "x.jsonl", "--instances_per_task", "5"), "instances_per_task has no meaning"),
        (("--task", "dolly", "--prompt_column", "q"), "prompt_column has no meaning for dolly"),
        (("--task", "text", "--source", "x", "--references_column", "q"), "references_column has no meaning for text"),
        (("--task", "examples", "--source", "x", "--context", "with"), "context has no meaning for examples"),
        (("--task", "text", "--source", "x", "--categories", "q"), "categories has no meaning for text"),
        (("--task", "dolly", "--context", "some"), "invalid choice: 'some'"),
        (("--task", "examples", "--source", "x", "--text_column", "q"), "text_column has no meaning for examples"),
        (
            ("--task", "vicuna", "--source", "x", "--answers", "y", "--dataset_config", "z"),
            "dataset_config has no meaning",
        ),
    ],
)
def test_options_without_meaning_are_refused(tmp_path, capsys, options, message):
    assert message in refused(capsys, tmp_path / "out", *options)
