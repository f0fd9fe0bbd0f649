"""Runs that resume with other settings: what is in force, what is said, and that nothing changes without a change."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build_model
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_reliable_runs import SAVED, make_fine_tuning
from test_trainer import DATASET, make_config, make_trainer, weights

from minillm_trl.baselines import FineTuningTrainer, KDTrainer
from minillm_trl.errors import UserError
from minillm_trl.training.checkpoints import CheckpointError
from minillm_trl.training.hyperparameters import read_groups, take_over
from minillm_trl.training.run_settings import describe_arguments, describe_dataset, describe_model, find_changes

SHORT = {**SAVED, "max_steps": 4, "lr_scheduler_type": "linear", "weight_decay": 0.1, "logging_steps": 1}
GREEDY = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": DATASET.select(range(4))}
SAID = "Settings differ from the checkpoint's"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder of a run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, **SHORT).train()
    return folder


def resume(folder: Path, **options):
    trainer = make_trainer(folder / "again", **{**SHORT, "save_strategy": "no", **options})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return trainer


def said(caplog) -> list[str]:
    """The lines of the one message about settings, `field: old -> new`."""
    messages = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert len(messages) <= 1
    return [line.strip() for line in messages[0].splitlines()[1:]] if messages else []


def rates(trainer) -> list[float]:
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


class TestHyperparameters:
    def test_learning_rate_of_now_is_in_force_at_the_schedules_place(self, saved, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = resume(saved, learning_rate=1e-3)
        assert said(caplog) == ["learning_rate: 0.01 -> 0.001"]
        # linear from 1 to 0 in 4 steps
        assert rates(trainer) == pytest.approx([1e-2, 7.5e-3, 5e-4, 2.5e-4])
        assert trainer.optimizer.param_groups[0]["initial_lr"] == 1e-3
        same = resume(saved)
        assert not torch.equal(weights(trainer), weights(same))

    def test_smaller_rate_moves_the_weights_less(self, saved):
        start = resume(saved, learning_rate=0.0)
        near, far = resume(saved, learning_rate=1e-5), resume(saved)
        distances = [(weights(trainer) - weights(start)).norm() for trainer in (near, far)]
        assert 0 < distances[0] < 0.01 * distances[1]

    def test_others_are_too(self, saved, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = resume(saved, weight_decay=0.5, adam_beta1=0.5, adam_epsilon=1e-4)
        assert said(caplog) == [
            "betas: [0.9, 0.999] -> [0.5, 0.999]",
            "eps: 1e-08 -> 0.0001",
            "weight_decay: 0.1 -> 0.5",
        ]
        decayed, others = trainer.optimizer.param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
        for group in (decayed, others):
            assert (group["betas"], group["eps"]) == ((0.5, 0.999), 1e-4)

    def test_schedule_of_now_is_in_force_from_the_first_step(self, saved, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = resume(saved, lr_scheduler_type="constant")
        assert said(caplog) == ["lr_scheduler_type: linear -> constant"]
        assert rates(trainer)[2:] == [1e-2, 1e-2]

    @pytest.mark.parametrize("checkpoint", ["checkpoint-2", True])
    def test_checkpoint_without_settings_is_compared_by_its_optimizer(self, tmp_path, caplog, checkpoint):
        make_trainer(tmp_path, **{**SHORT, "max_steps": 2}).train()
        for name in ("run_settings.json", "files.json"):
            (tmp_path / "checkpoint-2" / name).unlink()
        trainer = make_trainer(tmp_path, **{**SHORT, "learning_rate": 1e-3, "teacher_mixed_alpha": 0.5})
        asked = checkpoint if checkpoint is True else str(tmp_path / checkpoint)
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=asked)
        assert said(caplog) == ["learning_rate: 0.01 -> 0.001"]
        assert rates(trainer)[2:] == pytest.approx([5e-4, 2.5e-4])

    @pytest.mark.parametrize("kind", [FineTuningTrainer, KDTrainer])
    def test_of_the_baselines(self, tmp_path, caplog, kind: type):
        settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
        trainers = []
        for rate, checkpoint in ((1e-3, None), (1e-5, str(tmp_path / "checkpoint-2"))):
            trainer = make_fine_tuning(tmp_path, kind, save_strategy="steps", learning_rate=rate, **settings)
            with caplog.at_level(logging.WARNING):
                trainer.train(resume_from_checkpoint=checkpoint)
            trainers.append(trainer)
        assert said(caplog) == ["learning_rate: 0.001 -> 1e-05"]
        assert rates(trainers[1]) == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])

    @pytest.mark.parametrize(
        ("options", "field"),
        [({"optim": "adafactor"}, "optim"), ({"lr_scheduler_type": "greedy", **GREEDY}, "lr_scheduler_type")],
    )
    def test_other_kinds_are_refused_before_the_first_step(self, saved, options: dict, field: str):
        with pytest.raises(UserError, match=f"^{field}="):
            resume(saved, **options)


class TestTakeOver:
    """Optimizers and schedules beyond those that the trainers make."""

    def pair(self, rate: float, schedule=None, **options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=rate, **options)
        scheduler = (schedule or (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)))(optimizer)
        return optimizer, scheduler

    def resumed(self, schedule, given: float, steps: int = 3):
        """An optimizer at rate 0.1 saved after some steps, and one with a rate of now that has loaded it."""
        optimizer, scheduler = self.pair(0.1, schedule)
        before = read_groups(optimizer)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        other, other_scheduler = self.pair(given, schedule)
        now = read_groups(other)
        other.load_state_dict(optimizer.state_dict())
        other_scheduler.load_state_dict(scheduler.state_dict())
        return other, other_scheduler, take_over(other, other_scheduler, now, before)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
            lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2),
                    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
                ],
                milestones=[2],
            ),
        ],
        ids=["step", "cosine", "lambda", "sequence"],
    )
    def test_schedule_goes_as_if_the_rate_had_always_been_that_of_now(self, schedule):
        optimizer, scheduler, changes = self.resumed(schedule, 0.02)
        assert changes == [("lr", 0.1, 0.02)]
        other, other_scheduler = self.pair(0.02, schedule)
        for _ in range(3):
            other.step()
            other_scheduler.step()
        for _ in range(4):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"])
            for one, its in ((optimizer, scheduler), (other, other_scheduler)):
                one.step()
                its.step()

    def test_rate_that_a_plateau_has_lowered_stays_as_much_lower(self):
        optimizer, scheduler = self.pair(0.1, lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
        before = read_groups(optimizer)
        optimizer.param_groups[0]["lr"] = 0.05
        assert take_over(optimizer, scheduler, [{**before[0], "lr": 0.02}], before) == [("lr", 0.1, 0.02)]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)

    def test_state_among_the_hyperparameters_stays(self):
        optimizer, scheduler = self.pair(0.1)
        optimizer.param_groups[0]["d"] = 1e-6
        before = read_groups(optimizer)
        optimizer.param_groups[0]["d"] = 0.3  # as Prodigy estimates it
        assert take_over(optimizer, scheduler, before, before) == []
        assert optimizer.param_groups[0]["d"] == 0.3


class TestWhatIsSaid:
    def test_nothing_where_nothing_changed(self, saved, caplog, capsys):
        with caplog.at_level(logging.WARNING):
            resume(saved)
        assert said(caplog) == []
        assert f"Resuming from {saved / 'checkpoint-2'} at step 2 of 4." in capsys.readouterr().out

    def test_each_field_of_the_method_in_one_message(self, saved, caplog):
        options = {
            "teacher_mixed_alpha": 0.5,
            "temperature": 0.7,
            "max_completion_length": 8,
            "importance_weighting": "sequence",
            "importance_weight_cap": 2.0,
            "max_steps": 5,
        }
        with caplog.at_level(logging.WARNING):
            resume(saved, **options)
        assert said(caplog) == [
            "importance_weight_cap: None -> 2.0",
            "importance_weighting: token -> sequence",
            "max_completion_length: 12 -> 8",
            "max_steps: 4 -> 5",
            "teacher_mixed_alpha: 0.2 -> 0.5",
            "temperature: 1.0 -> 0.7",
        ]

    def test_data_and_models(self, saved, caplog):
        prompts = DATASET["prompt"]
        other = Dataset.from_dict({"prompt": [*prompts[:31], "another"], "references": DATASET["references"]})
        with caplog.at_level(logging.WARNING):
            resume(
                saved,
                dataset=other,
                teacher=build_model("gpt2", seed=3, width=48),
                reward_funcs=lambda completions, **unused: [float(len(completion)) for completion in completions],
            )
        found = said(caplog)
        assert [line.split(":")[0] for line in found] == ["reward_funcs", "teacher_model", "train_dataset"]

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"temperature": 0.7}, "temperature=1.0"),
            ({"gamma": 0.5}, "gamma=1.0"),
            ({"teacher": build_model("gpt2", seed=3, width=48)}, "teacher_model="),
        ],
        ids=["sampling", "rewards", "teacher"],
    )
    def test_rollouts_of_other_settings_are_dropped(self, saved, caplog, options: dict, name: str):
        with caplog.at_level(logging.WARNING):
            trainer = resume(saved, **options)
        assert f"The checkpoint's rollouts were made with {name}" in caplog.text
        assert "completions/mean_length" in trainer.state.log_history[2]  # of step 3, within the buffer of step 1
        assert "completions/mean_length" not in resume(saved).state.log_history[2]

    def test_adapter(self, tmp_path, caplog):
        for rank, checkpoint in ((8, None), (16, str(tmp_path / "checkpoint-2"))):
            trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, lora_alpha=rank), **SHORT)
            with caplog.at_level(logging.WARNING):
                trainer.train(resume_from_checkpoint=checkpoint)
        assert said(caplog) == ["peft_config.lora_alpha: 8 -> 16"]

    def test_what_changes_no_training_is_not_listed(self, saved, caplog):
        with caplog.at_level(logging.WARNING):
            resume(saved, save_total_limit=1, run_name="other", eval_dataset=None, log_completions=False)
        assert said(caplog) == []

    def test_secrets_are_not_in_a_checkpoint(self, tmp_path):
        options = {"hub_token": "hf_abcdefghij", "model_init_kwargs": {"token": "hf_abcdefghij"}}
        make_trainer(tmp_path, **{**SHORT, "max_steps": 2, "hub_token": "hf_abcdefghij"}).train()
        assert "hf_abcdefghij" not in json.dumps(describe_arguments(make_config(tmp_path, **options)))
        text = (tmp_path / "checkpoint-2" / "run_settings.json").read_text()
        assert "hf_abcdefghij" not in text
        assert json.loads(text)["teacher_mixed_alpha"] == 0.2

    def test_checkpoint_without_an_optimizer(self, tmp_path, caplog):
        make_trainer(tmp_path, **SHORT, save_only_model=True).train()
        trainer = make_trainer(tmp_path, **{**SHORT, "learning_rate": 1e-3})
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert "checkpoint-2 has no optimizer state (save_only_model=True)" in caplog.text
        assert said(caplog) == ["learning_rate: 0.01 -> 0.001"]
        assert rates(trainer)[2:] == pytest.approx([1e-3, 7.5e-4])  # the schedule's beginning

    def test_sharded_run_cannot_resume_without_an_optimizer(self, tmp_path):
        make_trainer(tmp_path, **SHORT, save_only_model=True).train()
        trainer = make_trainer(tmp_path, **SHORT)
        trainer.is_deepspeed_enabled = True
        with pytest.raises(CheckpointError, match=r"DeepSpeed needs to resume.*save_only_model=False"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    @pytest.mark.parametrize("skips", [False, True])
    def test_data_that_is_not_passed_over(self, saved, caplog, skips: bool):
        with caplog.at_level(logging.WARNING):
            resume(saved, ignore_data_skip=skips)
        assert ("ignore_data_skip=True" in caplog.text) == skips


class TestMissingWeights:
    def missing(self, tmp_path, monkeypatch, spoil=lambda checkpoint: None) -> list[str]:
        """The names that a resumed run with a tied head calls missing."""
        make_trainer(tmp_path, **{**SHORT, "max_steps": 2}).train()
        spoil(tmp_path / "checkpoint-2")
        found = []
        warn = transformers.Trainer._issue_warnings_after_load
        monkeypatch.setattr(
            transformers.Trainer,
            "_issue_warnings_after_load",
            lambda self, result: (found.extend(result.missing_keys), warn(self, result)),
        )
        make_trainer(tmp_path, **SHORT).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return found

    def test_tied_head_is_not_among_them(self, tmp_path, monkeypatch):
        assert build_model("gpt2").config.tie_word_embeddings
        assert self.missing(tmp_path, monkeypatch) == []

    def test_others_are(self, tmp_path, monkeypatch):
        def spoil(checkpoint: Path) -> None:
            tensors = load_file(checkpoint / "model.safetensors")
            del tensors["transformer.wte.weight"], tensors["transformer.ln_f.bias"]
            save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
            (checkpoint / "files.json").unlink()

        names = ["lm_head.weight", "transformer.ln_f.bias", "transformer.wte.weight"]
        assert sorted(self.missing(tmp_path, monkeypatch, spoil)) == names


class TestDescriptions:
    def test_dataset_is_the_same_if_its_rows_are(self):
        rows = {"prompt": [f"row {i}" for i in range(1000)]}
        one = describe_dataset(Dataset.from_dict(rows))
        assert describe_dataset(Dataset.from_dict(rows).map(lambda row: row)) == one
        rows["prompt"][998] = "another"
        assert (
            find_changes({"data": one}, {"data": describe_dataset(Dataset.from_dict(rows))}) == []
        )  # one in three is read
        rows["prompt"][501] = "another"
        (change,) = find_changes({"data": one}, {"data": describe_dataset(Dataset.from_dict(rows))})
        assert change.startswith("data: 1000 rows of prompt (")

    def test_moved_folder_is_the_same_model(self, tmp_path):
        model = build_model("gpt2")
        for name in ("one", "other"):
            model.save_pretrained(tmp_path / name)
        found = [describe_model(str(tmp_path / name)) for name in ("one", "other")]
        assert find_changes({"teacher": found[0]}, {"teacher": found[1]}) == []

    def test_models_of_the_hub_differ_by_name(self):
        one, other = describe_model("openai-community/gpt2"), describe_model("openai-community/gpt2-medium")
        assert find_changes({"teacher": one}, {"teacher": other}) == [
            "teacher: openai-community/gpt2 -> openai-community/gpt2-medium"
        ]

    def test_field_of_one_side_alone_is_no_change(self):
        assert find_changes({"old": 1, "same": {"a": 1}}, {"new": 2, "same": {"a": 1}}) == []

    def test_another_set_of_teachers_is_a_change(self):
        one, two = ({"is": name, "digest": None} for name in ("runs/one", "runs/two"))
        both, swapped = {"math": one, "code": two}, {"math": two, "code": two}
        assert find_changes({"teacher": both}, {"teacher": both}) == []
        assert find_changes({"teacher": both}, {"teacher": swapped}) == ["teacher.math: runs/one -> runs/two"]
        assert find_changes({"teacher": both}, {"teacher": {"math": one}}) == [
            "teacher: math: runs/one, code: runs/two -> math: runs/one"
        ]
        assert find_changes({"teacher": one}, {"teacher": both}) == [
            "teacher: runs/one -> math: runs/one, code: runs/two"
        ]
