"""SeqKD: what the teacher's completions are, that none is lost or made twice, and real runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, build_model, build_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm_trl.baselines.seqkd import (
    SeqKDConfig,
    generate,
    model_fingerprint,
    sample_with_transformers,
    sample_with_vllm,
)
from minillm_trl.baselines.teacher_data import TeacherCompletion, TeacherData
from minillm_trl.cli import main
from minillm_trl.rollouts.sampling import sample_prompts

PROMPTS = [f"the mill {'near the river ' * (i % 3)}{i}\n" for i in range(10)]


def config(folder: Path, **options) -> SeqKDConfig:
    options = {"max_completion_length": 8, "num_generations": 2, "generation_batch_size": 3, **options}
    return SeqKDConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **options)


def run(
    folder: Path, teacher, tokenizer, process: int = 0, processes: int = 1, stop_after: int = 99, found=None, **options
) -> TeacherData:
    """Generate this process's share, or no more than `stop_after` batches of it."""
    args = config(folder, **options)
    sample = sample_with_transformers(teacher, tokenizer, args)

    def stopped(jobs, prompt_ids):
        for number, batch in enumerate(sample(jobs, prompt_ids)):
            if number == stop_after:
                return
            yield batch

    data = TeacherData(folder / "data", {"seed": args.generation_seed})
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    generate(
        data,
        data.read() if found is None else found,
        prompts,
        tokenizer,
        stopped,
        args.num_generations,
        process,
        processes,
        progress=False,
    )
    return data


def finish(data: TeacherData, **options) -> bytes:
    data.finish(Dataset.from_dict({"prompt": PROMPTS}), **{"keep_unfinished": True, **options})
    return (data.folder / "train.jsonl").read_bytes()


@pytest.fixture(scope="module")
def teacher():
    return build_model("llama", len(build_tokenizer()))


class TestCompletions:
    def test_they_are_the_teachers_samples_at_the_keys_of_seed_prompt_and_sample(self, tmp_path, teacher, tokenizer):
        data = run(tmp_path, teacher, tokenizer, generation_seed=5, generation_temperature=0.7)
        jobs = [(row, sample) for row in range(len(PROMPTS)) for sample in range(2)]
        expected = sample_prompts(
            teacher,
            [tokenizer(PROMPTS[row])["input_ids"] for row, _ in jobs],
            keys=[(5, row) if sample == 0 else (5, row, sample) for row, sample in jobs],
            max_new_tokens=8,
            eos_token_ids=[tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            temperature=0.7,
        )
        found = data.read()
        assert [found[row, sample].tokens for row, sample in jobs] == list(map(len, expected))
        texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
        assert [found[row, sample].completion for row, sample in jobs] == texts
        ended = [ids[-1] == tokenizer.eos_token_id for ids in expected]
        assert [found[row, sample].finished for row, sample in jobs] == ended

    def test_rows_of_the_vocabulary_without_a_token_are_never_sampled(self, tmp_path, tokenizer):
        padded = build_model("llama", len(tokenizer) + 40)
        with torch.no_grad():
            padded.get_output_embeddings().weight[len(tokenizer) :] *= 5.0
        sample = sample_with_transformers(padded, tokenizer, config(tmp_path))
        (answers,) = sample([(row, 0) for row in range(3)], [[5], [6], [7]])
        assert max(token for _, ids, _ in answers for token in ids) < len(tokenizer)

    def test_the_space_that_a_completion_begins_with_is_kept(self, tmp_path, teacher, tokenizer, monkeypatch):
        # as SentencePiece has it, which drops the space where a text begins
        decode = type(tokenizer).decode
        monkeypatch.setattr(type(tokenizer), "decode", lambda self, *a, **k: decode(self, *a, **k).removeprefix(" "))
        ids = tokenizer(" is a cheap pub")["input_ids"]
        prompts = Dataset.from_dict({"prompt": ["the mill"]})
        data = TeacherData(tmp_path, {})
        generate(data, [], prompts, tokenizer, lambda jobs, _: iter([[(0, ids, True)]]), 1, progress=False)
        assert data.read()[0, 0].completion == " is a cheap pub"

    def test_empty_cut_and_repeated_ones_are_left_out_and_counted(self, tmp_path, tokenizer):
        answers = [("pub", True), ("pub", True), (" ", True), ("cut", False), ("pub", True)]
        prompts = Dataset.from_dict({"prompt": ["a\n", "b\n"], "references": [["a pub"], []]})

        def sample(jobs, prompt_ids):
            for number, job in enumerate(jobs):
                text, finished = answers[job[0] * 4 + job[1]] if job[0] == 0 else answers[4]
                yield [(number, tokenizer(text)["input_ids"] + [0], finished)]

        data = TeacherData(tmp_path, {})
        generate(data, [], prompts, tokenizer, sample, 4, progress=False)
        statistics = data.finish(prompts, keep_unfinished=False)
        rows = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
        assert rows == [{"prompt": "a\n", "completion": "pub"}, {"prompt": "b\n", "completion": "pub"}]
        assert statistics["dropped"] == {
            "said before to the same prompt": 1 + 3,
            "empty": 1,
            "cut at the length limit": 1,
        }
        assert statistics["rouge_l"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0 + 0) / 4)
        assert data.finish(prompts, keep_unfinished=True)["kept"] == 3

    def test_conversations_get_an_answer_as_a_message(self, tmp_path, tokenizer):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        try:
            conversation = [{"role": "user", "content": "the mill"}]
            prompts = Dataset.from_dict({"prompt": [conversation]})
            data = TeacherData(tmp_path, {})
            answer = (0, tokenizer("a pub")["input_ids"], True)
            generate(data, [], prompts, tokenizer, lambda jobs, _: iter([[answer]]), 1, progress=False)
            data.finish(prompts, keep_unfinished=False)
        finally:
            tokenizer.chat_template = None
        row = json.loads((tmp_path / "train.jsonl").read_text())
        assert row == {"prompt": conversation, "completion": [{"role": "assistant", "content": "a pub"}]}


class TestNothingIsLost:
    def test_stopped_and_torn_runs_end_in_the_same_bytes(self, tmp_path, teacher, tokenizer):
        whole = finish(run(tmp_path / "whole", teacher, tokenizer))
        (tmp_path / "torn").mkdir()
        data = run(tmp_path / "torn", teacher, tokenizer, stop_after=2)
        path = data.folder / "completions-0.jsonl"
        path.write_bytes(path.read_bytes()[:-7])  # a kill in the middle of a write
        assert len(data.read()) == 5
        # what is there is not made again
        lines = path.read_text().splitlines()[:5]
        assert finish(run(tmp_path / "torn", teacher, tokenizer)) == whole
        assert path.read_text().splitlines()[:5] == lines
        assert len(path.read_text().splitlines()) == 20

    def test_the_number_of_processes_does_not_matter_even_if_it_changes(self, tmp_path, teacher, tokenizer):
        whole = finish(run(tmp_path / "whole", teacher, tokenizer))
        parts = tmp_path / "parts"
        for process in range(3):  # each of which has seen an empty folder
            data = run(parts, teacher, tokenizer, process, 3, stop_after=1 if process else 99, found=[])
        found = data.read()
        assert 0 < len(found) < 20
        for process in range(2):
            data = run(parts, teacher, tokenizer, process, 2, found=found)
        assert len(data.read()) == sum(len(path.open().readlines()) for path in data.folder.glob("*.jsonl"))
        assert finish(data) == whole

    def test_other_settings_in_the_same_folder_are_refused(self, tmp_path, teacher, tokenizer):
        run(tmp_path, teacher, tokenizer)
        with pytest.raises(ValueError, match=r"seed=0; now it is 1.*teacher_data_dir"):
            run(tmp_path, teacher, tokenizer, generation_seed=1)

    def test_completion_that_cannot_be_written_again_is_refused_with_its_line(self, tmp_path, teacher, tokenizer):
        data = run(tmp_path, teacher, tokenizer)
        path = data.folder / "completions-0.jsonl"
        broken = json.loads(path.read_text().splitlines()[0]) | {"completion": "\ud800"}
        path.write_text(path.read_text() + json.dumps(broken) + "\n")
        with pytest.raises(ValueError, match=r"completions-0.jsonl:21: .*surrogates"):
            data.read()

    def test_answer_to_a_prompt_that_is_not_there_is_refused(self, tmp_path):
        data = TeacherData(tmp_path, {})
        data.open_share(0)([TeacherCompletion(row, 0, " a pub", 2, True) for row in (0, len(PROMPTS))])
        with pytest.raises(ValueError, match="answers prompt 10, but there are 10"):
            finish(data)

    def test_nothing_to_learn_from_is_an_error(self, tmp_path, tokenizer):
        prompts = Dataset.from_dict({"prompt": ["a\n"]})
        data = TeacherData(tmp_path, {})
        generate(data, [], prompts, tokenizer, lambda jobs, _: iter([[(0, [5], False)]]), 1, progress=False)
        with pytest.raises(ValueError, match=r"cut at the length limit.*Raise max_completion_length"):
            data.finish(prompts, keep_unfinished=False)


class TestVllm:
    def test_requests_have_seeds_of_their_own(self, tmp_path, tokenizer, monkeypatch):
        calls = SimpleNamespace(init=None, requests=[])

        class LLM:
            def __init__(self, **kwargs):
                calls.init = kwargs

            def generate(self, prompts, params, use_tqdm):
                calls.requests += list(zip(prompts, params, strict=True))
                answer = SimpleNamespace(token_ids=(7, 0), finish_reason="stop")
                return [SimpleNamespace(outputs=[answer]) for _ in prompts]

        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = LLM, lambda **kwargs: kwargs
        monkeypatch.setitem(sys.modules, "vllm", module)
        args = config(
            tmp_path, use_vllm=True, vllm_tensor_parallel_size=2, teacher_model_init_kwargs={"dtype": "half"}
        )
        sample = sample_with_vllm("teacher", tokenizer, args, chunk=2)
        jobs = [(0, 0), (0, 1), (1, 0)]
        batches = list(sample(jobs, [[5], [5], [6]]))
        assert calls.init == {
            "model": "teacher",
            "tensor_parallel_size": 2,
            "trust_remote_code": False,
            "load_format": "safetensors",
            "dtype": "half",
        }
        assert batches == [[(0, [7, 0], True), (1, [7, 0], True)], [(2, [7, 0], True)]]
        assert [prompt["prompt_token_ids"] for prompt, _ in calls.requests] == [[5], [5], [6]]
        assert len({params["seed"] for _, params in calls.requests}) == 3
        assert all(0 <= params["seed"] < 2**31 for _, params in calls.requests)
        assert {(params["temperature"], params["max_tokens"]) for _, params in calls.requests} == {(1.0, 8)}

        sample_with_vllm("teacher", tokenizer, config(tmp_path, use_vllm=True, allow_pickled_weights=True))
        assert "load_format" not in calls.init

    def test_pickled_weights_are_refused(self, tmp_path, tokenizer, monkeypatch):
        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = SimpleNamespace, SimpleNamespace
        monkeypatch.setitem(sys.modules, "vllm", module)
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(ValueError, match="only as a pickle"):
            sample_with_vllm(str(tmp_path), tokenizer, config(tmp_path, use_vllm=True))

    def test_without_vllm_the_message_says_how_to_get_it(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ImportError, match=r"pip install 'minillm-trl\[vllm\]'"):
            sample_with_vllm("teacher", tokenizer, config(tmp_path, use_vllm=True))


def arguments(tmp_path: Path, model_dir, output: Path, *more: str) -> list[str]:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": prompt, "completion": " is a pub"} for prompt in PROMPTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model_name_or_path", model_dir("llama"), "--teacher_model_name_or_path", model_dir("gpt2", 1, 48)),
        *("--dataset", str(data), "--eval_dataset", str(data), "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--predict_with_generate", "true", "--max_completion_length", "6", "--output_dir", str(output)),
        *("--keep_unfinished", "true", "--max_steps", "2", "--num_generations", "2", "--use_cpu", "true"),
        *("--bf16", "false", "--report_to", "none", "--gradient_checkpointing", "false", *more),
    ]


class TestFingerprint:
    def test_it_is_of_the_contents_also_far_into_a_large_file(self, tmp_path):
        size = 64 * 2**20
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(bytes(size))
        before = model_fingerprint(tmp_path)
        os.utime(weights, ns=(0, 0))
        assert model_fingerprint(tmp_path) == before
        with open(weights, "r+b") as file:
            file.seek(size // 2)
            file.write(b"1" * (size // 1024))  # less than a matrix
        assert model_fingerprint(tmp_path) != before

    def test_an_adapter_has_that_of_its_base_and_a_name_on_the_hub_none(self, tmp_path):
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        for folder in (base, adapter):
            folder.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        (base / "model.safetensors").write_bytes(b"1")
        before = model_fingerprint(adapter)
        (base / "model.safetensors").write_bytes(b"2")
        assert model_fingerprint(adapter) != before
        assert model_fingerprint(Path("openai-community/gpt2")) is None


class TestCommandLine:
    def test_the_student_learns_from_the_teachers_words(self, tmp_path, model_dir, capsys):
        output, answers = tmp_path / "out", tmp_path / "out_teacher_data"
        assert main(["seqkd", *arguments(tmp_path, model_dir, output, "--generate_only", "true")]) == 0
        assert not output.exists() or [path.name for path in output.glob("*.json*")] == ["run.json"]
        train = (answers / "train.jsonl").read_bytes()
        assert main(["seqkd", *arguments(tmp_path, model_dir, output)]) == 0
        assert "has all completions" in capsys.readouterr().out
        assert (answers / "train.jsonl").read_bytes() == train
        student = AutoModelForCausalLM.from_pretrained(output)
        start = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
        assert AutoTokenizer.from_pretrained(output).get_vocab() == build_tokenizer().get_vocab()

    def test_other_weights_in_the_teachers_folder_are_refused_and_a_copy_is_not(self, tmp_path, model_dir, capsys):
        teacher = tmp_path / "teacher"
        shutil.copytree(model_dir("gpt2", 1, 48), teacher)
        more = ("--generate_only", "true", "--teacher_model_name_or_path", str(teacher))
        run = ["seqkd", *arguments(tmp_path, model_dir, tmp_path / "out", *more)]
        assert main(run) == 0
        shutil.rmtree(teacher)
        shutil.copytree(model_dir("gpt2", 1, 48), teacher, copy_function=shutil.copyfile)
        (teacher / "trainer_state.json").write_text("{}")
        capsys.readouterr()
        assert main(run) == 0
        assert "has all completions" in capsys.readouterr().out
        shutil.copy(Path(model_dir("gpt2", 2, 48)) / "model.safetensors", teacher)
        assert main(run) == 2
        assert "completions that were made with teacher_files=" in capsys.readouterr().err

    def test_keep_unfinished_chooses_anew_among_the_same_answers(self, tmp_path, model_dir, monkeypatch, capsys):
        run = ["seqkd", *arguments(tmp_path, model_dir, tmp_path / "out", "--generate_only", "true")]
        assert main(run) == 0
        monkeypatch.setattr("minillm_trl.models.teacher.load_teacher", lambda *_: pytest.fail("loaded the teacher"))
        answers = tmp_path / "out_teacher_data"
        found = [json.loads(line) for line in (answers / "completions-0.jsonl").open()]
        found[0] |= {"finished": True, "completion": "a pub"}
        (answers / "completions-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
        for keep in (False, True):
            assert main([*run, "--keep_unfinished", str(keep).lower()]) == 0
            statistics = json.loads((answers / "statistics.json").read_text())
            assert statistics["keep_unfinished"] is keep
            assert len((answers / "train.jsonl").open().readlines()) == statistics["kept"]
            assert ("cut at the length limit" in statistics["dropped"]) is not keep

    def test_validation_data_without_completions_is_refused_before_the_teacher_answers(
        self, tmp_path, model_dir, capsys
    ):
        rows = [{"prompt": "the mill", "completion": "a pub"}, {"prompt": "the pub", "completion": None}]
        evaluation = tmp_path / "validation.jsonl"
        run = ["seqkd", *arguments(tmp_path, model_dir, tmp_path / "out", "--eval_dataset", str(evaluation))]
        evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(run) == 2
        assert f"{evaluation}: row 1 (counting from 0) has no completion" in capsys.readouterr().err
        evaluation.write_text(json.dumps({"prompt": "the mill", "references": ["a pub"]}) + "\n")
        assert main(run) == 2
        assert f"{evaluation}: row 0 (counting from 0) has no completion" in capsys.readouterr().err
        assert not (tmp_path / "out_teacher_data").exists()

    def test_vllm_on_several_processes_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(SeqKDConfig, "world_size", 2)
        with pytest.raises(ValueError, match="generate_only=True"):
            config(tmp_path, use_vllm=True)

    @pytest.mark.distributed
    def test_a_killed_run_on_two_processes_goes_on_to_what_one_process_makes(self, tmp_path, model_dir):
        one, two = tmp_path / "one", tmp_path / "two"
        more = ("--generate_only", "true", "--num_generations", "40", "--generation_batch_size", "2")
        assert main(["seqkd", *arguments(tmp_path, model_dir, one, *more)]) == 0
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launcher, "-m", "minillm_trl", "seqkd", *arguments(tmp_path, model_dir, two, *more)]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        share = tmp_path / "two_teacher_data" / "completions-1.jsonl"
        deadline = time.time() + 120
        while not (share.is_file() and share.stat().st_size > 500) and time.time() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "two_teacher_data" / "train.jsonl").exists()
        for _ in range(2):  # a gloo process aborts at its exit once in some dozens of runs
            result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            if result.returncode == 0:
                break
        assert result.returncode == 0, result.stderr[-2000:]
        assert (tmp_path / "two_teacher_data" / "train.jsonl").read_bytes() == (
            tmp_path / "one_teacher_data" / "train.jsonl"
        ).read_bytes()
