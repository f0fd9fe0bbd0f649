"""The folder of a teacher's completions and what fills it, on made-up answers."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import build_model, build_tokenizer
from datasets import Dataset
from test_seqkd import config

from minillm_trl.baselines import seqkd
from minillm_trl.baselines.seqkd import generate, generation_settings, sample_with_transformers, sample_with_vllm
from minillm_trl.baselines.teacher_data import TeacherCompletion, TeacherData
from minillm_trl.errors import FileError

TOKENIZER = build_tokenizer()
PROMPTS = Dataset.from_dict({"prompt": ["a\n", "the mill near the river\n", "the mill\n"]})


def answer(*jobs: tuple[int, int], text: str = " a pub", tokens: int = 3) -> list[TeacherCompletion]:
    return [TeacherCompletion(*job, text, tokens, True) for job in jobs]


class TestFolder:
    def test_statistics_are_of_all_completions(self, tmp_path):
        data = TeacherData(tmp_path, {})
        assert data.finished_with is None
        kept = [TeacherCompletion(0, number, f" pub {number}", tokens, True) for number, tokens in enumerate(range(5))]
        data.open_share(0)([*kept, TeacherCompletion(1, 0, "", 100, True), TeacherCompletion(2, 0, " cut", 8, False)])
        for keep in (True, False):
            statistics = data.finish(PROMPTS, keep)
            assert statistics == {
                "completions": 7,
                "keep_unfinished": keep,
                "kept": 6 if keep else 5,
                "dropped": {"empty": 1} if keep else {"empty": 1, "cut at the length limit": 1},
                "tokens": {"0%": 0.0, "25%": 1.5, "50%": 3.0, "75%": 6.0, "95%": pytest.approx(72.4), "100%": 100.0},
            }
            assert json.loads((tmp_path / "statistics.json").read_text()) == statistics
            assert data.finished_with is keep

    def test_prompts_without_references_have_no_rouge_l(self, tmp_path):
        data = TeacherData(tmp_path, {})
        data.open_share(0)(answer((0, 0)))
        prompts = PROMPTS.add_column("references", [[], [], ["a"]])
        assert "rouge_l" not in data.finish(prompts, False)

    @pytest.mark.parametrize("row", [-1, 3])
    def test_answer_to_no_prompt_is_refused(self, tmp_path, row: int):
        data = TeacherData(tmp_path, {})
        data.open_share(0)(answer((0, 0), (row, 0)))
        with pytest.raises(ValueError, match=f"answers prompt {row}, but there are 3"):
            data.finish(PROMPTS, True)

    def test_batch_is_on_disk_before_the_next_one_begins(self, tmp_path, monkeypatch):
        sizes = []
        monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
        append = TeacherData(tmp_path, {}).open_share(3)
        for sample in range(2):
            append(answer((0, sample)))
            assert sizes[-1] == (tmp_path / "completions-3.jsonl").stat().st_size > 0
        assert len(sizes) == 2

    def test_words_of_all_languages_stay_readable(self, tmp_path):
        data = TeacherData(tmp_path, {})
        data.open_share(0)(answer((0, 0), text=" café 酒馆"))
        data.finish(PROMPTS, True)
        for name in ("completions-0.jsonl", "train.jsonl"):
            assert " café 酒馆".encode() in (tmp_path / name).read_bytes()
        assert data.read()[0, 0].completion == " café 酒馆"

    def test_full_disk_is_told_with_the_file(self, tmp_path, monkeypatch):
        append = TeacherData(tmp_path, {}).open_share(0)

        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"completions-0.jsonl cannot be written: .*No space left"):
            append(answer((0, 0)))

    def test_selection_that_was_not_written_whole_does_not_count(self, tmp_path, monkeypatch):
        data = TeacherData(tmp_path, {})
        data.open_share(0)(answer((0, 0)))
        data.finish(PROMPTS, True)

        def full(path: Path, content: str) -> None:
            raise FileError("full")

        monkeypatch.setattr("minillm_trl.baselines.teacher_data.write_whole", full)
        with pytest.raises(FileError):
            data.finish(PROMPTS, False)
        assert TeacherData(tmp_path, {}).finished_with is None

    def test_completion_that_ends_in_a_tear_is_cut_off(self, tmp_path):
        data = TeacherData(tmp_path, {})
        data.open_share(0)(answer((0, 0), (0, 1)))
        path = tmp_path / "completions-0.jsonl"
        whole = path.read_bytes()
        for torn in (whole[:-1], whole + b"{", whole + whole[:20], b"{"):
            path.write_bytes(torn)
            data.open_share(0)
            assert path.read_bytes() == torn[: torn.rfind(b"\n") + 1]


class TestGenerate:
    def run(self, folder: Path, found: set, **options: Any) -> list[tuple]:
        """Answer each job in a batch of its own with two tokens, and return the jobs with their prompts."""
        seen: list[tuple] = []

        def sample(jobs: list, prompt_ids: list[list[int]]):
            seen.extend(zip(jobs, prompt_ids, strict=True))
            for number in range(len(jobs)):
                yield [(number, [*TOKENIZER(" pub")["input_ids"], 0], True)]

        data = TeacherData(folder, {})
        generate(data, found, PROMPTS, TOKENIZER, sample, 2, **{"progress": False, **options})
        return seen

    def test_missing_completions_are_asked_for_with_the_longest_prompts_first(self, tmp_path):
        ids = TOKENIZER(PROMPTS["prompt"][:])["input_ids"]
        order = [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]
        assert self.run(tmp_path, set()) == [(job, ids[job[0]]) for job in order]
        found = TeacherData(tmp_path, {}).read()
        tokens = len(TOKENIZER(" pub")["input_ids"]) + 1
        assert found == {job: TeacherCompletion(*job, " pub", tokens, True) for job in order}
        assert [job for job, _ in self.run(tmp_path, {(1, 1), (0, 0)})] == [(1, 0), (2, 0), (2, 1), (0, 1)]
        parts = [self.run(tmp_path, {(1, 1)}, process=process, num_processes=2) for process in range(2)]
        assert [[job for job, _ in part] for part in parts] == [[(1, 0), (2, 1), (0, 1)], [(2, 0), (0, 0)]]

    def test_progress_counts_those_of_all_processes(self, tmp_path, monkeypatch):
        bars = []

        class Bar:
            def __init__(self, total: int, initial: int, disable: bool, **_: Any):
                self.total, self.n, self.disable, self.steps = total, initial, disable, []
                bars.append(self)

            def __enter__(self):
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, number: int) -> None:
                self.n += number
                self.steps.append(number)

        monkeypatch.setattr(seqkd, "tqdm", Bar)
        self.run(tmp_path, {(1, 1)}, process=0, num_processes=2, progress=True)
        (bar,) = bars
        assert (bar.total, bar.n, bar.steps, bar.disable) == (6, 6, [2, 2, 1], False)
        self.run(tmp_path, set(), progress=False)
        assert bars[1].disable

    def test_text_is_decoded_alone_where_it_changes_its_prompt(self, tmp_path, monkeypatch):
        # as a tokenizer does that removes the space before a full stop
        decode = type(TOKENIZER).decode
        monkeypatch.setattr(type(TOKENIZER), "decode", lambda *a, **k: decode(*a, **k).replace(" .", "."))
        prompts = Dataset.from_dict({"prompt": ["the mill "]})
        data = TeacherData(tmp_path, {})
        ids = TOKENIZER(". a pub")["input_ids"]
        generate(data, [], prompts, TOKENIZER, lambda *_: iter([[(0, ids, True)]]), 1, progress=False)
        assert data.read()[0, 0].completion == ". a pub"

    def test_answer_in_a_conversation_is_decoded_alone(self, tmp_path, monkeypatch):
        # as SentencePiece has it, which drops the space where a text begins
        decode = type(TOKENIZER).decode
        monkeypatch.setattr(type(TOKENIZER), "decode", lambda *a, **k: decode(*a, **k).removeprefix(" "))
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "the mill"}]]})
        ids = tokenizer(" a pub")["input_ids"]
        data = TeacherData(tmp_path, {})
        generate(data, [], prompts, tokenizer, lambda *_: iter([[(0, ids, True)]]), 1, progress=False)
        assert data.read()[0, 0].completion == "a pub"

    def test_conversations_are_asked_with_the_arguments_of_their_template(self, tmp_path):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ mark }}{% endfor %}"
        prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "the mill"}]]})
        seen = []

        def sample(jobs: list, prompt_ids: list[list[int]]):
            seen.extend(prompt_ids)
            return iter([])

        kwargs = {"mark": " near the river"}
        generate(TeacherData(tmp_path, {}), [], prompts, tokenizer, sample, 1, chat_template_kwargs=kwargs)
        assert seen == [tokenizer("the mill near the river")["input_ids"]]


class TestSettings:
    def test_they_are_all_that_the_completions_depend_on(self, tmp_path):
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        (teacher / "model.safetensors").write_bytes(b"1")
        options = {"generation_temperature": 0.7, "generation_seed": 5, "chat_template_kwargs": {"thinks": False}}
        args = config(tmp_path, **options, teacher_model_init_kwargs={"revision": "main"})
        found = generation_settings(str(teacher), args, PROMPTS)
        hashes = {name: found.pop(name) for name in ("prompts", "teacher_files")}
        assert found == {
            "teacher": str(teacher),
            "num_generations": 2,
            "max_completion_length": 8,
            "use_vllm": False,
            "teacher_model_init_kwargs": {"revision": "main"},
            **options,
        }
        assert None not in hashes.values()
        others = Dataset.from_dict({"prompt": ["a\n", "the mill near the river\n", "the pub\n"]})
        assert generation_settings(str(teacher), args, others)["prompts"] != hashes["prompts"]
        (teacher / "model.safetensors").write_bytes(b"2")
        changed = generation_settings(str(teacher), args, PROMPTS)
        assert changed["teacher_files"] != hashes["teacher_files"]
        assert changed["prompts"] == hashes["prompts"]

    def test_order_of_the_fields_of_a_message_is_no_other_prompt(self, tmp_path):
        found = [
            generation_settings("t", config(tmp_path), Dataset.from_dict({"prompt": [[message]]}))["prompts"]
            for message in ({"role": "user", "content": "a"}, {"content": "a", "role": "user"})
        ]
        assert found[0] == found[1]


class TestTransformers:
    def test_conversation_ends_with_the_template_s_end_of_a_turn(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(seqkd, "sample_prompts", lambda *_, **options: seen.append(options) or [[7, 1]])
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ end }}{% endfor %}"
        args = config(tmp_path, chat_template_kwargs={"end": "<pad>"})
        teacher = build_model("gpt2", len(tokenizer))
        teacher.generation_config.eos_token_id = 9
        for conversational, ends in ((False, [0, 9]), (True, [0, 1, 9])):
            sample = sample_with_transformers(teacher, tokenizer, args, conversational)
            assert list(sample([(0, 0)], [[5]])) == [[(0, [7, 1], conversational)]]
            assert sorted(seen[-1]["eos_token_ids"]) == ends
            assert seen[-1]["pad_token_id"] == 1
        tokenizer.pad_token = None
        list(sample_with_transformers(teacher, tokenizer, args)([(0, 0)], [[5]]))
        assert (seen[-1]["pad_token_id"], sorted(seen[-1]["eos_token_ids"])) == (0, [0, 9])


class TestVllm:
    @pytest.fixture
    def vllm(self, monkeypatch) -> SimpleNamespace:
        """Stands in for vLLM: each answer but the first was cut."""
        calls = SimpleNamespace(init=None, params=[], bars=[])

        class LLM:
            def __init__(self, **kwargs):
                calls.init = kwargs

            def generate(self, prompts, params, use_tqdm=True):
                calls.params += params
                calls.bars.append(use_tqdm)
                reasons = ["stop", *["length"] * (len(prompts) - 1)]
                answers = [
                    SimpleNamespace(token_ids=(7, number), finish_reason=reason)
                    for number, reason in enumerate(reasons)
                ]
                return [SimpleNamespace(outputs=[answer]) for answer in answers]

        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = LLM, lambda **kwargs: kwargs
        monkeypatch.setitem(sys.modules, "vllm", module)
        return calls

    def test_cut_answers_are_not_finished(self, tmp_path, vllm):
        sample = sample_with_vllm("teacher", TOKENIZER, config(tmp_path, use_vllm=True))
        assert list(sample([(0, 0), (0, 1)], [[5], [5]])) == [[(0, [7, 0], True), (1, [7, 1], False)]]
        assert vllm.bars == [False]  # besides the one of `generate`
        # of SHA-256 of "0:0:0" and "0:0:1": another version of the package repeats the requests
        assert [params["seed"] for params in vllm.params] == [1952781802, 769533419]
        assert all("stop_token_ids" not in params for params in vllm.params)

    def test_conversations_end_with_the_template_s_end_of_a_turn(self, tmp_path, vllm):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ end }}{% endfor %}"
        args = config(tmp_path, use_vllm=True, chat_template_kwargs={"end": "<pad>"})
        list(sample_with_vllm("teacher", tokenizer, args, conversational=True)([(0, 0)], [[5]]))
        assert vllm.params[0]["stop_token_ids"] == [tokenizer.pad_token_id]
        list(sample_with_vllm("teacher", tokenizer, args)([(0, 0)], [[5]]))
        assert "stop_token_ids" not in vllm.params[1]
        tokenizer.chat_template = None
        list(sample_with_vllm("teacher", tokenizer, args, conversational=True)([(0, 0)], [[5]]))
        assert "stop_token_ids" not in vllm.params[2]
