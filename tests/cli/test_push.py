"""`minillm-trl push`: the card has evaluation, teacher and recipe, and only the model's files are uploaded."""

import json

import huggingface_hub
import pytest
import yaml
from conftest import build_model, build_tokenizer
from evaluation_results import write_results
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from minillm_trl.cli import main


@pytest.fixture
def model(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "minillm"
    tokenizer = build_tokenizer()
    build_model("llama", len(tokenizer), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    attempt = {
        "status": "finished",
        "steps": 96,
        "versions": {"minillm-trl": "0.1.0", "torch": "2.13.0"},
        # a folder that is gone, whose name could be one on the hub
        "models": {"student": {"name": "runs/healed", "fingerprint": "0" * 8}, "teacher": {"name": "org/teacher"}},
        "data": {"train": {"source": f"org/prompts + {tmp_path / 'own.jsonl'}"}},
    }
    (folder / "run.json").write_text(json.dumps({"subcommand": "minillm", "attempts": [attempt]}))
    recipe = {
        "teacher_mixed_alpha": 0.2,
        "output_dir": "x",
        "teacher_server_url": ["http://node7:8000"],
        "datasets": [{"path": str(tmp_path / "prompts.jsonl")}],
    }
    (folder / "run.yaml").write_text("# head\n" + yaml.safe_dump(recipe))
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "optimizer.pt").write_text("state")
    for name in ("checkpoint-8/model.safetensors", "training_args.bin", "secrets.json", "train.log", ".env"):
        (folder / name).write_text("private")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: the repositories and the files that were uploaded."""
    calls = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        calls["repository"] = (repo_id, private)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        calls["files"] = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_card_and_model_are_uploaded(tmp_path, model, hub, capsys):
    write_results(tmp_path / "evaluation", {"rouge_l": [40.0, 60.0]}, model=str(model), teacher="org/teacher")
    words = ["push", "--model", str(model), "--repo_id", "me/student", "--evaluation", str(tmp_path / "evaluation")]
    assert main(words) == 0
    assert hub["repository"] == ("me/student", True)
    assert set(hub["files"]) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    card = ModelCard.load(model / "README.md")
    assert card.data.eval_results[0].metric_value == 50.0
    assert card.data.datasets == ["org/prompts"]
    assert card.data.base_model is None  # the student was a folder
    assert "Its teacher is `org/teacher`. Training started from `healed`." in card.text
    assert "The data is `org/prompts` and `own.jsonl`." in card.text
    assert "path: prompts.jsonl" in card.text
    assert "node7" not in card.text
    assert str(tmp_path) not in card.content
    assert "teacher_mixed_alpha: 0.2" in card.text
    assert "output_dir" not in card.text
    assert "gu2024minillm" in card.text
    (row,) = [line for line in card.text.splitlines() if line.startswith("| ") and "50.0" in line]
    assert row == "| dolly | temperature 1.0 | 2 | 50.0 ± 10.0 |"
    assert main([*words, "--public"]) == 0  # a card of ours is replaced
    assert hub["repository"] == ("me/student", False)


def test_card_alone_needs_no_hub(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", None)
    assert main(["push", "--model", str(model), "--repo_id", "me/student", "--card_only"]) == 0
    assert "## Evaluation" not in (model / "README.md").read_text()


def test_card_written_by_hand_is_kept(model, hub, capsys):
    (model / "README.md").write_text("mine")
    words = ["push", "--model", str(model), "--repo_id", "me/student"]
    assert main(words) == 2
    assert "README.md was written by hand" in capsys.readouterr().err
    assert not hub
    assert main([*words, "--overwrite_card"]) == 0
    (model / "README.md").write_text("tags:\n- generated_from_trainer\n")
    assert main(words) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json or adapter_config.json"),
        (
            lambda folder: (folder / "run.json").write_text(
                json.dumps({"subcommand": "kd", "attempts": [{"status": "killed"}]})
            ),
            "the run is killed",
        ),
    ],
)
def test_unfinished_model_is_refused(model, hub, capsys, change, message):
    change(model)
    assert main(["push", "--model", str(model), "--repo_id", "me/student"]) == 2
    assert message in capsys.readouterr().err
    assert not hub


@pytest.mark.parametrize(("base", "status"), [("org/base", 0), ("/models/base", 2), (None, 0)])
def test_adapter_of_a_local_base_is_refused(model, hub, capsys, base: str | None, status: int):
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 2}))
    assert main(["push", "--model", str(model), "--repo_id", "me/student"]) == status
    assert ("Merge the adapter" in capsys.readouterr().err) == bool(status)
    assert bool(hub) == (not status)


@pytest.mark.parametrize("name", ["student", "me/my student", "a/b/c"])
def test_name_that_no_repository_can_have_is_refused(model, hub, capsys, name: str):
    assert main(["push", "--model", str(model), "--repo_id", name]) == 2
    assert f"--repo_id {name}: " in capsys.readouterr().err
    assert not (model / "README.md").exists()


def test_evaluation_of_another_model_is_refused(tmp_path, model, hub, capsys):
    write_results(tmp_path / "evaluation", {"rouge_l": [40.0]}, model="org/other")
    words = ["push", "--model", str(model), "--repo_id", "me/student", "--evaluation", str(tmp_path / "evaluation")]
    assert main(words) == 2
    assert "was measured on org/other" in capsys.readouterr().err


def test_failed_upload_says_what_to_check(model, hub, monkeypatch, capsys):
    def offline(self, *unused, **unused_too):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    assert main(["push", "--model", str(model), "--repo_id", "me/student"]) == 2
    assert "Check the network, HF_TOKEN and its write access to me" in capsys.readouterr().err
    assert (model / "README.md").is_file()
