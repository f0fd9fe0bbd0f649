"""Stored scores of a teacher: what is in the folder, that it resumes, and training from it."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_trainer import PROMPTS, make_config, weights
from transformers import AutoModelForCausalLM

from minillm_trl import MiniLLMTrainer
from minillm_trl.cli import main
from minillm_trl.cli.offline_teacher import _rows, build_parser
from minillm_trl.errors import UserError
from minillm_trl.models.encoding import encode_after_prompt
from minillm_trl.presets import preset
from minillm_trl.teacher_server import stored
from minillm_trl.teacher_server.protocol import Row, encode_rows
from minillm_trl.teacher_server.service import TeacherService
from minillm_trl.teacher_server.stored import OfflineTeacher, StoredScores, given_rows, store_scores
from minillm_trl.teacher_server.top_k import TopK

LIMIT = 10
DATA = Dataset.from_dict(
    {"prompt": PROMPTS, "completion": [f"a cheap pub {'by the mill ' * (i % 3)}{i}" for i in range(len(PROMPTS))]}
)
VOCAB = len(build_tokenizer())


def teacher(seed: int = 1) -> torch.nn.Module:
    return build_model("gpt2", VOCAB, seed=seed, width=48)


def store(folder: Path, seed: int = 1, top_k: int = VOCAB, data: Dataset = DATA, **options) -> TeacherService:
    service = TeacherService(teacher(seed), build_tokenizer(), "the-teacher", batch_size=4)
    rows = list(given_rows(list(data), build_tokenizer(), LIMIT))
    settings = {"temperature": 1.0, "vocab_size": VOCAB, "max_completion_length": LIMIT, **options}
    store_scores(service, rows, folder, top_k=top_k, **settings)
    return service


def make_trainer(folder: Path, scores: Path | None, data: Dataset = DATA, student=None, **options) -> MiniLLMTrainer:
    defaults = {**preset("lightning_opd"), "max_completion_length": LIMIT, "max_steps": 6}
    given = {} if scores is None else {"offline_teacher": str(scores)}
    return MiniLLMTrainer(
        student or build_model("gpt2", VOCAB, seed=0),
        teacher() if scores is None else None,
        args=make_config(folder, **{**defaults, **given, **options}),
        train_dataset=data,
        processing_class=build_tokenizer(),
    )


class TestFolder:
    def test_scores_are_those_of_a_plain_forward_pass(self, tmp_path: Path):
        service = store(tmp_path / "scores", top_k=5)
        pool = StoredScores(tmp_path / "scores")
        for number in (0, 3, len(DATA) - 1):
            start, ids = encode_after_prompt(build_tokenizer(), DATA[number]["prompt"], DATA[number]["completion"])
            row = Row(ids[:start], ids[start:][:LIMIT])
            (packed,) = pool.score([row], None)
            top, whole = TopK.unpack(packed), torch.tensor([row.prompt + row.completion])
            with torch.no_grad():
                log_probs = torch.log_softmax(service.model(whole).logits[0, start - 1 : -1], -1)
            torch.testing.assert_close(top.logps[:, :5], log_probs.topk(5).values, atol=1e-5, rtol=1e-5)
            sampled = log_probs.gather(1, torch.tensor(row.completion)[:, None])[:, 0]
            torch.testing.assert_close(top.logps[:, -1], sampled, atol=1e-5, rtol=1e-5)
            assert top.ids[:, -1].tolist() == row.completion

    def test_every_row_has_its_scores_in_any_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Completions of any length, one of them twice; the last file has fewer rows."""
        monkeypatch.setattr(stored, "ROWS_OF_FILE", 4)
        service = TeacherService(teacher(), build_tokenizer(), "it", batch_size=3)
        rows = [Row([5 + n, 6][: 1 + n % 2], list(range(7, 8 + 3 * n % 7))) for n in range(9)]
        rows.append(rows[1])
        counts: list[int] = []
        options = {"top_k": 5, "temperature": 0.7, "vocab_size": VOCAB - 3, "max_completion_length": LIMIT}
        store_scores(service, rows, tmp_path, **options, on_rows=counts.append)
        assert counts == [4, 4, 2]
        names = ["scores-00000000.safetensors", "scores-00000004.safetensors", "scores-00000008.safetensors"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "settings.json"]
        pool = StoredScores(tmp_path)
        assert pool.identity == service.identity
        assert pool.settings == {
            **options,
            "teacher": service.identity.to_json(),
            "rows": 10,
            "data": hashlib.sha256(encode_rows(rows)).hexdigest(),
        }
        for row, packed in zip(reversed(rows), pool.score(rows[::-1], None), strict=True):
            expected = service.score([row], 5, 0.7, VOCAB - 3)
            assert packed.shape == (len(row.completion), 13)
            assert torch.equal(TopK.unpack(packed).ids, expected.ids)
            torch.testing.assert_close(packed, expected.pack(), rtol=1e-4, atol=1e-4)
            assert pool.has(row)
        moved = Row(rows[3].prompt + rows[3].completion[:1], rows[3].completion[1:])  # the same text
        assert not pool.has(moved)
        with pytest.raises(UserError, match=f"completion of {len(moved.completion)} tokens after a prompt of 3"):
            pool.score([rows[0], moved], None)

    @pytest.mark.parametrize("count", [1, 64, 65])
    def test_a_file_has_64_rows(self, tmp_path: Path, count: int):
        service = TeacherService(teacher(), build_tokenizer(), "it", batch_size=64)
        rows = [Row([5], [6 + n]) for n in range(count)]
        options = {"top_k": 1, "temperature": 1.0, "vocab_size": VOCAB, "max_completion_length": LIMIT}
        store_scores(service, rows, tmp_path, **options)
        assert len(list(tmp_path.glob("*.safetensors"))) == 1 + (count > 64)
        assert all(map(StoredScores(tmp_path).has, rows))

    def test_nothing_is_written_if_a_row_cannot_be_scored(self, tmp_path: Path):
        service = TeacherService(teacher(), build_tokenizer(), "it", batch_size=3)
        options = {"top_k": 5, "temperature": 1.0, "vocab_size": VOCAB - 3, "max_completion_length": LIMIT}
        with pytest.raises(UserError, match=r"'it' .* cannot score the data: row 1 has a completion token outside"):
            store_scores(service, [Row([5], [6]), Row([5], [VOCAB - 3])], tmp_path / "scores", **options)
        assert not (tmp_path / "scores").exists()

    def test_rows_are_those_of_training(self):
        """Cut at the limit; conversations go through the template with its arguments."""
        tokenizer, text = build_tokenizer(), "a cheap pub by the mill near the river"
        whole, cut = (
            next(given_rows([{"prompt": "the ", "completion": text}], tokenizer, limit)) for limit in (99, 3)
        )
        assert (cut.prompt, cut.completion) == (whole.prompt, whole.completion[:3])
        assert whole.completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole.prompt + whole.completion[:-1]) == "the " + text
        tokenizer.chat_template = "{{ extra }}{% for m in messages %}{{ m['content'] + '<eos>' }}{% endfor %}"
        chat = {
            "prompt": [{"role": "user", "content": "the"}],
            "completion": [{"role": "assistant", "content": "mill"}],
        }
        (row,) = given_rows([chat], tokenizer, 99, {"extra": "a pub"})
        assert tokenizer.decode(row.prompt) == "a pubthe<eos>"
        assert tokenizer.decode(row.completion) == "mill<eos>"
        for example in ({"prompt": "the mill"}, {"prompt": "the mill", "completion": None}):
            with pytest.raises(UserError, match="prompt 'the mill' has no completion"):
                list(given_rows([{"prompt": "a", "completion": "b"}, example], tokenizer, 9))

    def test_teacher_of_a_folder_has_its_settings(self, tmp_path: Path):
        store(tmp_path / "scores", top_k=5, temperature=0.7)
        args = SimpleNamespace(offline_teacher=str(tmp_path / "scores"), temperature=0.7, max_completion_length=LIMIT)
        found = OfflineTeacher.open(args)
        assert (found.top_k, found.temperature, found.tokens) == (5, 0.7, "teacher")
        assert found.identity == found.pool.identity
        found.check(build_tokenizer(), conversational=True)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "scores"))):
            found.check(build_tokenizer(280), conversational=False)
        other = build_tokenizer()
        other.chat_template = "{{ messages[0].content }}"
        found.check(other, conversational=False)
        with pytest.raises(UserError, match="template"):
            found.check(other, conversational=True)
        examples = [*DATA.select(range(3)), {"prompt": "the mill", "completion": "other"}]
        found.check_data(examples[:3], build_tokenizer(), LIMIT)
        with pytest.raises(UserError, match="no scores of row 3 of the training data, with the prompt 'the mill'"):
            found.check_data(examples, build_tokenizer(), LIMIT)
        with pytest.raises(UserError, match="no scores of row 1 "):
            found.check_data(examples[:3], build_tokenizer(), LIMIT - 1)

    def test_interrupted_command_computes_only_what_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(stored, "ROWS_OF_FILE", 8)
        scored: list[int] = []
        score = TeacherService.score

        def counting(self, rows, *arguments):
            if len(scored) == 2:
                raise KeyboardInterrupt
            scored.append(len(rows))
            return score(self, rows, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(TeacherService, "score", counting)
            with pytest.raises(KeyboardInterrupt):
                store(tmp_path / "scores")
        with pytest.raises(UserError, match="incomplete: scores-00000016"):
            StoredScores(tmp_path / "scores")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
        store(tmp_path / "scores")
        files = sorted((tmp_path / "scores").glob("*.safetensors"))
        assert len(files) == len(DATA) // 8
        assert all(path.stat().st_mtime_ns == before[path] for path in files[:2])
        store(tmp_path / "whole")
        for path in files:
            for name, tensor in load_file(path).items():
                assert torch.equal(tensor, load_file(tmp_path / "whole" / path.name)[name])

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"top_k": 3}, "top_k"),
            ({"seed": 2}, "teacher"),
            ({"temperature": 0.7}, "temperature"),
            ({"data": DATA.select(range(31))}, "data"),
        ],
    )
    def test_folder_of_other_scores_is_refused(self, tmp_path: Path, changed: dict, named: str):
        store(tmp_path / "scores", top_k=5)
        message = f"scores holds scores that were computed with {named}=.*; now .* Name another folder"
        with pytest.raises(UserError, match=message):
            store(tmp_path / "scores", **{"top_k": 5, **changed})

    def test_damaged_file_is_named(self, tmp_path: Path):
        store(tmp_path / "scores", top_k=5)
        (path,) = (tmp_path / "scores").glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match="damaged"):
            StoredScores(tmp_path / "scores")

    def test_row_that_does_not_fit_the_context_is_named(self, tmp_path: Path):
        data = Dataset.from_dict({"prompt": ["a", "pub " * 200], "completion": ["b", "c"]})
        with pytest.raises(UserError, match="row 1 has"):
            store(tmp_path / "scores", data=data)

    def test_row_without_a_completion_is_named(self, tmp_path: Path):
        with pytest.raises(UserError, match="the mill"):
            store(tmp_path / "scores", data=Dataset.from_dict({"prompt": ["the mill"], "completion": [""]}))


class TestTraining:
    @pytest.mark.parametrize("divergence", ["reverse_kl", "generalized_jsd"])
    def test_it_ends_with_the_weights_of_a_run_with_the_teacher(self, tmp_path: Path, divergence: str):
        store(tmp_path / "scores")
        options = {"single_step_divergence": divergence, "learning_rate": 0.05, "optim": "sgd"}
        found, expected, start = (
            make_trainer(tmp_path / name, scores, **options)
            for name, scores in (("a", tmp_path / "scores"), ("b", None), ("c", None))
        )
        found.train()
        expected.train()
        torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=1e-5)
        assert (weights(expected) - weights(start)).abs().max() > 1e-3
        assert found.teacher_model is None

    def test_reverse_kl_falls_and_fewer_tokens_give_a_lower_bound(self, tmp_path: Path):
        store(tmp_path / "all")
        store(tmp_path / "few", top_k=4)
        losses = {}
        for name in ("all", "few"):
            trainer = make_trainer(tmp_path / "run", tmp_path / name, max_steps=12, learning_rate=3e-3)
            trainer.train()
            history = trainer.state.log_history
            losses[name] = [row["objective/reverse_kl_per_token"] for row in history if "loss" in row]
        assert losses["all"][-1] < 0.7 * losses["all"][0]
        assert losses["few"][0] < losses["all"][0]

    def test_resumed_run_has_the_weights_of_a_whole_one(self, tmp_path: Path):
        store(tmp_path / "scores", top_k=8)
        options = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 3}
        whole = make_trainer(tmp_path / "run", tmp_path / "scores", **options)
        whole.train()
        resumed = make_trainer(tmp_path / "run", tmp_path / "scores", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lmbda", 0.5),
            ("eval_strategy", "steps"),
            ("horizon_start", 3),
            ("kd_temperature", 2.0),
            ("single_step_divergence", "entropy_aware_kl"),
            ("teacher_hidden_states", "recompute"),
            ("lm_kd_ratio", 0.5),
            ("offload_teacher", True),
            ("skd_top_k", 3),
            ("teacher_model_init_kwargs", {"dtype": "float16"}),
            ("teacher_server_url", "http://127.0.0.1:1"),
        ],
    )
    def test_setting_that_scores_cannot_follow(self, tmp_path: Path, name: str, value: object):
        with pytest.raises(UserError, match=f"^{name}=.*offline_teacher: (?!.*server (samples|loads))"):
            make_config(tmp_path, **{**preset("lightning_opd"), "offline_teacher": "scores", name: value})

    @pytest.mark.parametrize(
        ("name", "wanted", "was"), [("temperature", 0.5, 1.0), ("max_completion_length", LIMIT - 1, LIMIT)]
    )
    def test_scores_of_other_settings(self, tmp_path: Path, name: str, wanted: float, was: float):
        store(tmp_path / "scores", top_k=4)
        with pytest.raises(UserError, match=f"^{name}={wanted}, but .* with {name}={was}. Set {name}={was}"):
            make_trainer(tmp_path, tmp_path / "scores", **{name: wanted})

    def test_scores_of_other_data(self, tmp_path: Path):
        store(tmp_path / "scores", top_k=4)
        data = DATA.map(
            lambda row, i: {"completion": "another pub" if i == 7 else row["completion"]}, with_indices=True
        )
        with pytest.raises(UserError, match=r"row 7 .*the punter near"):
            make_trainer(tmp_path, tmp_path / "scores", data)

    def test_stream_whose_rows_cannot_be_checked(self, tmp_path: Path):
        store(tmp_path / "scores", top_k=4)
        with pytest.raises(UserError, match="is a stream"):
            make_trainer(tmp_path, tmp_path / "scores", DATA.to_iterable_dataset())

    def test_another_vocabulary(self, tmp_path: Path):
        store(tmp_path / "scores", top_k=4, vocab_size=VOCAB - 1)
        with pytest.raises(UserError, match=f"share {VOCAB} rows"):
            make_trainer(tmp_path, tmp_path / "scores")

    def test_folder_without_scores_and_two_teachers(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"no settings\.json"):
            make_trainer(tmp_path, tmp_path / "nothing")
        args = make_config(tmp_path, **preset("lightning_opd"), offline_teacher="scores")
        with pytest.raises(UserError, match="both given"):
            MiniLLMTrainer(build_model("gpt2", VOCAB), teacher(), args=args, train_dataset=DATA)


def test_completions_end_as_in_a_training_with_eos_tokens(model_dir):
    folder, tokenizer = model_dir("gpt2", 0), build_tokenizer()
    words = ["--model", folder, "--teacher", folder, "--dataset", "rows", "--output_dir", "scores"]
    arguments = build_parser().parse_args([*words, "--eos_tokens", "<pad>"])
    for row in _rows(arguments, DATA, tokenizer, TeacherService(teacher(), build_tokenizer(), "it", batch_size=4)):
        assert tokenizer.convert_ids_to_tokens(row.completion)[-1] == "<pad>"


def test_adapter_as_student_is_refused_before_anything_is_loaded(
    tmp_path: Path, model_dir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    student = AutoModelForCausalLM.from_pretrained(model_dir("gpt2", 0))
    get_peft_model(student, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("minillm_trl.data.load_examples", lambda *given, **options: pytest.fail("read the data"))
    words = ["offline-teacher", "--model", str(tmp_path / "adapter"), "--teacher", model_dir("gpt2", 1, 48)]
    assert main([*words, "--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "scores")]) == 2
    assert f"--model {tmp_path / 'adapter'} is an adapter" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


@pytest.mark.slow  # a dozen seconds
def test_commands(tmp_path: Path, model_dir, capsys: pytest.CaptureFixture):
    """Score a file twice, and train on it without a teacher."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    words = ["--model", model_dir("gpt2", 0), "--dataset", str(rows), "--max_completion_length", "12"]
    score = [
        "offline-teacher",
        *words,
        "--teacher",
        model_dir("gpt2", 1, 48),
        "--output_dir",
        str(tmp_path / "scores"),
    ]
    assert main([*score, "--top_k", "8"]) == 0
    assert main([*score, "--top_k", "8"]) == 0
    assert f"scores of {len(DATA)} completions" in capsys.readouterr().err
    assert main([*score, "--top_k", "9"]) == 2
    train = ["minillm", "--preset", "lightning_opd", "--model_name_or_path", model_dir("gpt2", 0)]
    train += ["--dataset_name", str(rows), "--offline_teacher", str(tmp_path / "scores"), "--max_completion_length"]
    train += ["12", "--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--steps_per_generation", "2"]
    train += ["--per_device_train_batch_size", "4", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    assert main([*train, "--eval_strategy", "no"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
