"""Mistakes of the user are told in one message; faults of the program keep their traceback."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

import minillm_trl
from minillm_trl.cli import compare, main, training
from minillm_trl.data import DataError
from minillm_trl.errors import FileError, MissingPackageError, UserError
from minillm_trl.evaluation.chat_client import ChatError
from minillm_trl.files.whole_files import make_folder, write_whole
from minillm_trl.training.checkpoints import CheckpointError

PACKAGE = Path(minillm_trl.__file__).parent
# Functions of tensors and numbers, whose callers are at fault; `json_files` rejects what its callers name
PURE = ("objectives", "masking", "rollouts/sampling", "rollouts/keyed_random", "models/fused_head")
PURE += ("models/token_scores", "models/divergence_gradients", "divergences", "positions", "files/json_files")
PURE += ("teacher_server/vllm_server",)  # caught where an answer is read
PURE += tuple(
    f"evaluation/{name}"
    for name in (
        *("metrics", "statistics", "calibration"),
        *("report", "exposure_bias", "divergence", "frontier", "plots"),
    )
)


class TestCommandLine:
    def test_user_error_is_one_message_and_status_2(self, monkeypatch, capsys):
        def fail(argv):
            raise UserError("the mill is closed")

        monkeypatch.setattr(compare, "run", fail)
        assert main(["compare"]) == 2
        assert capsys.readouterr().err.splitlines()[0] == "minillm-trl compare: the mill is closed"

    @pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, RuntimeError, PermissionError])
    def test_any_other_exception_is_raised(self, monkeypatch, kind):
        def fail(argv):
            raise kind("fault")

        monkeypatch.setattr(compare, "run", fail)
        with pytest.raises(kind, match="fault"):
            main(["compare"])

    def test_traceback_of_a_user_error_is_shown_on_demand(self, monkeypatch):
        def fail(argv):
            raise UserError("the mill is closed")

        monkeypatch.setattr(compare, "run", fail)
        monkeypatch.setenv("MINILLM_TRL_TRACEBACK", "1")
        with pytest.raises(UserError):
            main(["compare"])

    @pytest.mark.cli
    @pytest.mark.smoke  # imports hardly anything
    def test_reader_that_has_gone_ends_the_command_without_a_traceback(self):
        code = "import sys\nfrom minillm_trl.cli import compare, main\n"
        code += "compare.run = lambda argv: [print('the mill') for _ in range(100_000)]\nsys.exit(main(['compare']))"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        assert process.stdout.readline() == b"the mill\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


class TestTraining:
    """Exceptions in the middle of a training."""

    @pytest.fixture
    def words(self, tmp_path, model_dir) -> list[str]:
        data = tmp_path / "train.jsonl"
        data.write_text('{"prompt": "the mill", "completion": " is cheap"}\n' * 4)
        words = ["sft", "--dataset", str(data), "--model_name_or_path", model_dir("llama")]
        words += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--report_to", "none"]
        return [*words, "--max_steps", "1", "--save_strategy", "no"]

    @staticmethod
    def attempt(tmp_path: Path) -> dict:
        (attempt,) = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]
        return attempt

    def test_fault_of_the_program_is_raised_and_leaves_its_traceback_in_the_record(self, tmp_path, words, monkeypatch):
        def fail(*_):
            raise ValueError("only one element tensors can be converted to Python scalars")

        monkeypatch.setattr(training, "train_and_save", fail)
        with pytest.raises(ValueError, match="only one element"):
            main(words)
        attempt = self.attempt(tmp_path)
        assert attempt["status"] == "failed"
        assert attempt["error"] == "ValueError: only one element tensors can be converted to Python scalars"
        assert attempt["traceback"].startswith("Traceback (most recent call last)")
        assert "test_errors.py" in attempt["traceback"]
        assert ", in fail" in attempt["traceback"]

    def test_user_error_is_a_message_in_both(self, tmp_path, words, monkeypatch, capsys):
        def fail(*_):
            raise UserError("the mill is closed")

        monkeypatch.setattr(training, "train_and_save", fail)
        assert main(words) == 2
        assert "minillm-trl sft: the mill is closed" in capsys.readouterr().err
        attempt = self.attempt(tmp_path)
        assert (attempt["status"], attempt["error"]) == ("failed", "UserError: the mill is closed")
        assert "traceback" not in attempt

    def test_output_folder_that_is_a_file_is_named(self, tmp_path, words, capsys):
        (tmp_path / "run").write_text("")
        assert main(words) == 2
        assert f"{tmp_path / 'run'} cannot be written" in capsys.readouterr().err

    def test_what_the_configurations_of_transformers_refuse_is_a_message(self, words, capsys):
        assert main([*words, "--load_best_model_at_end", "true", "--eval_strategy", "steps"]) == 2
        assert "load_best_model_at_end requires the save and eval strategy to match" in capsys.readouterr().err


def test_kinds_of_user_errors_are_what_they_were_before_too():
    assert issubclass(DataError, UserError)
    assert issubclass(ChatError, UserError)
    assert issubclass(UserError, ValueError)
    assert issubclass(CheckpointError, FileError)
    assert issubclass(FileError, OSError)
    assert issubclass(MissingPackageError, ImportError)


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/x\.json cannot be written"):
        write_whole(tmp_path / "file" / "x.json", "{}")
    with pytest.raises(FileError, match="file/folder cannot be written"):
        make_folder(tmp_path / "file" / "folder")
    write_whole(tmp_path / "x.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.json"]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).with_suffix("").as_posix()
)
def test_refusals_are_user_errors(path: Path):
    """A plain `ValueError` of ours would be taken for a fault of the program."""
    if path.relative_to(PACKAGE).with_suffix("").as_posix() in PURE:
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("ValueError", "OSError")
    ]
    assert calls == []
