"""`overlap_rollouts`: which weights sample a rollout, what a resumed run continues with, and how the thread ends."""

import copy
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fixed_rollouts import train
from peft import LoraConfig
from test_cross_tokenizer import save_teacher
from test_distributed import assert_same, run, train_distributed
from test_reliable_runs import AtStep, assert_same_run, history
from test_trainer import DATASET, PROMPTS, make_config, make_trainer, weights
from transformers import TrainerCallback

from minillm_trl.errors import UserError
from minillm_trl.presets import preset
from minillm_trl.training import overlapped_rollouts
from minillm_trl.training.prompt_order import EpochRepeatSampler
from minillm_trl.training.rollout_scoring import RolloutScoring

THREAD = "next rollout"
EPOCHS = DATASET.select(range(16))  # two rollouts an epoch
LORA = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
UNCHANGED = LoraConfig(r=4, target_modules=["c_attn", "c_fc"])  # starts as the base, the reference of `beta`
HALF = {"bf16": True, "half_precision_rollouts": True}


def lengths(completion_ids: list[list[int]], **unused) -> list[float]:
    return [len(ids) / 4 for ids in completion_ids]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


class RecordedRollouts:
    """The rows and the batch of every rollout of a trainer, and the weights from which its updates start."""

    def __init__(self, trainer):
        self.rows, self.batches, self.weights = [], [], []
        make_rollout = trainer._make_rollout

        def recorded(rows):
            self.weights.append(copy.deepcopy(trainer.model.state_dict()))
            batch = make_rollout(rows)
            self.rows.append(rows)
            self.batches.append(batch)
            return batch

        trainer._make_rollout = recorded


def sampled_by(trainer, state: dict, rows: list[dict], step: int) -> dict[str, torch.Tensor]:
    """The rollout that a trainer without overlap samples from given weights."""
    trainer.model.load_state_dict(state)
    trainer.model.train()
    trainer.state.global_step = step
    return trainer._generate_and_score_completions(rows)


def assert_same_batch(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


CASES = {
    "mixed": {},
    "student alone": {"teacher_mixed_alpha": 0.0, "sampling_batch_size": 3},
    "expected rewards": {"teacher_mixed_alpha": 0.0, "reward_estimator": "expected", "top_entropy_quantile": 0.5},
    "speculative": {"mixing": "speculative", "family": "llama", "teacher_hidden_states": "cpu"},
    "groups": {
        "num_generations": 2,
        "reward_funcs": [lengths],
        "shared_coins": False,
        "horizon_start": 3,
        "horizon_steps": 20,
    },
    "lora": {"peft_config": LORA},
    "lora, not merged": {"peft_config": UNCHANGED, "merged_rollouts": False, "beta": 0.1},
    "half precision": HALF,
    "half precision, merged": {**HALF, "peft_config": LORA},
    "autocast": {"bf16": True, "half_precision_rollouts": False},
}


@pytest.mark.parametrize("name", CASES)
def test_rollout_is_sampled_and_scored_by_the_student_from_before_the_last_updates(tmp_path, name: str):
    options = {"num_iterations": 2, "max_steps": 12, "dataset": EPOCHS, **CASES[name]}
    trainer = make_trainer(tmp_path, overlap_rollouts=True, **options)
    rollouts = RecordedRollouts(trainer)
    trainer.train()
    reference = make_trainer(tmp_path, **options)
    assert len(rollouts.batches) == 3
    for number, (rows, batch) in enumerate(zip(rollouts.rows, rollouts.batches, strict=True)):
        sampler = rollouts.weights[max(number - 1, 0)]
        assert_same_batch(batch, sampled_by(reference, sampler, rows, 4 * number))
        if number:  # a fresh rollout is another one
            fresh = sampled_by(reference, rollouts.weights[number], rows, 4 * number)
            assert not torch.equal(fresh["student_logps"], batch["student_logps"])
    staleness = [log["rollout/staleness"] for log in trainer.state.log_history if "rollout/staleness" in log]
    assert staleness == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("teacher", ["several", "with another tokenizer"])
def test_a_student_that_does_not_move_has_the_same_rollouts_without_overlap(tmp_path, teacher: str):
    options = {"corpus": False, "learning_rate": 0.0, "max_steps": 9, "several_teachers": teacher == "several"}
    if teacher == "several":
        options |= {"teacher_mixed_alpha": 0.3, "reward_estimator": "expected"}
    else:
        options |= {**preset("cross_tokenizer"), "teacher": save_teacher(tmp_path / "teacher")}
    plain, overlapped = (train(str(tmp_path / str(each)), 4, 1, overlap_rollouts=each, **options) for each in (0, 1))
    logs = [{name: log[name] for name in log if not name.startswith("rollout/stale")} for log in history(overlapped)]
    assert logs == history(plain)
    assert [log["rollout/staleness"] for log in history(overlapped) if "rollout/staleness" in log] == [0.0, 1.0, 1.0]


def test_without_overlap_nothing_is_copied_and_the_first_buffer_is_the_same(tmp_path):
    plain = make_trainer(tmp_path, max_steps=2)
    plain.train()
    overlapped = make_trainer(tmp_path, max_steps=2, overlap_rollouts=True)
    overlapped.train()
    assert plain._rollout_copy is None
    assert torch.equal(weights(plain), weights(overlapped))
    assert not any(name.startswith("rollout/wait") for log in history(plain) for name in log)


def test_updates_do_not_change_what_is_being_sampled(tmp_path, monkeypatch):
    """The thread starts only when all updates on the current buffer are done."""
    trainer = make_trainer(tmp_path, max_steps=4, overlap_rollouts=True)
    undisturbed = make_trainer(tmp_path, max_steps=4, overlap_rollouts=True)
    undisturbed.train()
    updated = threading.Event()
    sample_ahead = RolloutScoring.sample_ahead

    def late(*arguments):
        assert updated.wait(60)
        return sample_ahead(*arguments)

    monkeypatch.setattr(RolloutScoring, "sample_ahead", late)
    trainer.add_callback(AtStep(1, lambda: threading.Timer(0.1, updated.set).start()))
    trainer.train()
    assert updated.is_set()
    assert torch.equal(weights(trainer), weights(undisturbed))


def test_given_rollouts_are_scored_once_the_thread_is_done(tmp_path):
    trainer, order = make_trainer(tmp_path, teacher_mixed_alpha=0.0), []
    trainer._overlap = SimpleNamespace(wait=lambda: order.append("wait"))
    trainer.teacher_model.base_model.register_forward_pre_hook(lambda *unused: order.append("teacher"))
    trainer.score_rollouts(*torch.ones(4, 2, 3, dtype=torch.long))
    assert order == ["wait", "teacher"]


def test_thread_draws_from_no_generator(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, overlap_rollouts=True)
    states = []
    for step in (1, 2):  # after the start of the thread, and when its rollout is due
        trainer.add_callback(AtStep(step, lambda: states.append(torch.get_rng_state())))
    trainer.train()
    assert torch.equal(*states)


def test_rows_of_a_rollout_are_those_that_the_data_loader_reads():
    sampler = EpochRepeatSampler(EPOCHS, mini_repeat_count=2, batch_size=3, repeat_count=4, shuffle=True, seed=5)
    read = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        read += [order[start : start + 6] for start in range(0, len(order), 4 * 6)]
    assert len(read) == 10  # five an epoch: the sixteenth row is left out
    assert [sampler.rollout(number) for number in range(10)] == read
    assert sampler.epoch == 1


def test_a_rollout_that_the_run_does_not_need_is_not_started(tmp_path, monkeypatch):
    started = []
    start = overlapped_rollouts.OverlappedRollouts.start
    monkeypatch.setattr(
        overlapped_rollouts.OverlappedRollouts,
        "start",
        lambda self, student, turn, sample: started.append(turn.keys[0]) or start(self, student, turn, sample),
    )
    make_trainer(tmp_path, max_steps=5, overlap_rollouts=True).train()
    assert [key[2] for key in started] == [2, 4]  # the third buffer is not used up
    assert not threads()


class TestEvaluation:
    @pytest.mark.parametrize("options", [{}, {"peft_config": LORA}], ids=["full", "lora"])
    def test_samples_from_the_current_student_and_changes_no_rollout(self, tmp_path, options: dict):
        options = {"max_steps": 6, "overlap_rollouts": True, **options}
        evaluated = {"eval_dataset": DATASET.select(range(4)), "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(tmp_path, **options, **evaluated)
        states = []

        class Keep(TrainerCallback):
            def on_evaluate(self, args, state, control, model, **unused):
                states.append(copy.deepcopy(model.state_dict()))

        trainer.add_callback(Keep())
        trainer.train()
        plain = make_trainer(tmp_path, **options)
        plain.train()
        assert torch.equal(weights(trainer), weights(plain))
        fresh = make_trainer(tmp_path, **{**options, "overlap_rollouts": False}, eval_dataset=DATASET.select(range(4)))
        logs = [log for log in trainer.state.log_history if "eval_loss" in log]
        for state, log in zip(states, logs, strict=True):
            fresh.model.load_state_dict(state)
            found = fresh.evaluate()
            assert found["eval_loss"] == log["eval_loss"]
            assert found["eval_objective/reverse_kl"] == log["eval_objective/reverse_kl"]


SAVED = {"overlap_rollouts": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "logging_steps": 1}


class TestResume:
    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({}, (1, 2, 3)),  # at the start, end and start of a buffer of two steps
            ({"teacher_mixed_alpha": 0.0, "teacher_hidden_states": "cpu", "dataset": EPOCHS}, (2, 4)),
            ({"peft_config": LORA, "mixing": "speculative"}, (3,)),
            ({**HALF, "reward_funcs": [lengths], "reward_estimator": "expected"}, (2,)),
        ],
        ids=["mixed", "states on the cpu", "lora", "half precision"],
    )
    def test_from_a_checkpoint_ends_as_the_uninterrupted_run(self, tmp_path, options: dict, steps: tuple[int, ...]):
        whole = make_trainer(tmp_path / "whole", **SAVED, **options)
        whole.train()
        unsaved = make_trainer(tmp_path / "unsaved", **{**SAVED, **options, "save_strategy": "no"})
        unsaved.train()
        assert torch.equal(weights(whole), weights(unsaved))  # waiting for checkpoints changes nothing
        for step in steps:
            folder = tmp_path / f"from {step}"
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
            resumed = make_trainer(folder, **SAVED, **options)
            resumed.train(resume_from_checkpoint=True)
            assert_same_run(resumed, whole)

    def test_of_a_trainer_that_was_interrupted_continues_with_the_checkpoint(self, tmp_path):
        whole = make_trainer(tmp_path / "whole", **SAVED)
        whole.train()
        trainer = make_trainer(tmp_path / "cut", **SAVED)

        def interrupt():
            trainer.remove_callback(cut)
            raise KeyboardInterrupt

        cut = AtStep(3, interrupt)
        trainer.add_callback(cut)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not threads()
        trainer.train(resume_from_checkpoint=True)
        assert_same_run(trainer, whole)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"temperature": 0.9}, "next rollout was sampled with temperature=1.0"),
            ({"dataset": "others"}, "has other prompts or teachers"),
        ],
        ids=["settings", "prompts"],
    )
    def test_with_other_settings_or_prompts_samples_again(self, tmp_path, caplog, changes: dict, message: str):
        make_trainer(tmp_path, **{**SAVED, "max_steps": 4}).train()
        shutil.rmtree(tmp_path / "checkpoint-4")
        if "dataset" in changes:
            changes = {"dataset": Dataset.from_dict({"prompt": [f"{prompt} mill" for prompt in PROMPTS]})}
        for other in (1, 3):
            shutil.rmtree(tmp_path / f"checkpoint-{other}")
        resumed = make_trainer(tmp_path, **SAVED, **changes)
        with caplog.at_level("WARNING", logger="minillm_trl"):
            resumed.train(resume_from_checkpoint=True)
        assert message in caplog.text
        logged = [log["rollout/staleness"] for log in resumed.state.log_history if "rollout/staleness" in log]
        assert logged[-2:] == [0.0, 1.0]

    def test_with_other_coins_takes_the_rollout(self, tmp_path, caplog):
        make_trainer(tmp_path, **{**SAVED, "max_steps": 4}).train()
        resumed = make_trainer(tmp_path, **SAVED, shared_coins=False)
        with caplog.at_level("WARNING", logger="minillm_trl"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert "It is discarded" not in caplog.text
        logged = [log["rollout/staleness"] for log in resumed.state.log_history if "rollout/staleness" in log]
        assert logged[-2:] == [1.0, 1.0]

    def test_without_overlap_drops_the_rollout(self, tmp_path):
        make_trainer(tmp_path, **{**SAVED, "max_steps": 4}).train()
        resumed = make_trainer(tmp_path, **{**SAVED, "overlap_rollouts": False})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_vllm": True, "teacher_mixed_alpha": 0.0}, "use_vllm=True"),
        ({"top_p": 0.9, "teacher_mixed_alpha": 0.0}, "top_p=0.9"),
        ({"compile_rollouts": "auto"}, "compile_rollouts='auto'"),
        ({"teacher_hidden_states": "recompute"}, "teacher_hidden_states='recompute'"),
        ({"lm_kd_ratio": 0.5}, "lm_kd_ratio=0.5"),
        ({"offload_teacher": True}, "offload_teacher=True"),
        ({"shard_teacher": True}, "shard_teacher=True"),
        ({"lmbda": 0.5, "rkl_advantage": False, "teacher_mixed_alpha": 0.0}, "lmbda=0.5"),
        ({"skd_top_k": 5, "rkl_advantage": False, "teacher_mixed_alpha": 0.0}, "skd_top_k=5"),
        (
            {
                "teacher_server_url": ["http://localhost:1"],
                "teacher_mixed_alpha": 0.0,
                "reward_estimator": "expected",
            },
            "reward_estimator='expected'",
        ),
        ({"ignore_data_skip": True}, "ignore_data_skip=True"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_a_thread_does_not_work_with_are_refused(tmp_path, options: dict, words: str):
    make_config(tmp_path, **options)
    with pytest.raises(UserError, match=f"{words} does not work with overlap_rollouts=True: .*Drop"):
        make_config(tmp_path, overlap_rollouts=True, **options)


def calculator(number: int) -> int:
    """Return a number.

    Args:
        number: any number.
    """
    return number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout_func": lambda prompts, trainer: {}}, "excludes rollout_func"),
        ({"tools": [calculator]}, "excludes tools"),
        ({"dataset": DATASET.to_iterable_dataset()}, "train_dataset is a stream"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_cannot_be_sampled_ahead_are_refused(tmp_path, options: dict, words: str):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, overlap_rollouts=True, **options)


def test_a_sharded_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minillm_trl.rollouts.rollout_teacher.is_sharded", lambda model: True)
    with pytest.raises(UserError, match="this teacher_model is sharded"):
        make_trainer(tmp_path, overlap_rollouts=True)


@pytest.mark.parametrize(
    ("attribute", "strategy"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")]
)
def test_strategies_other_than_ddp_are_refused(tmp_path, attribute: str, strategy: str):
    trainer = make_trainer(tmp_path)
    trainer.args.overlap_rollouts = True
    setattr(trainer, attribute, True)
    with pytest.raises(UserError, match=f"but this run uses {strategy}. Use DDP"):
        overlapped_rollouts.overlapped_rollouts(trainer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        {"shared_coins": False, "teacher_mixed_alpha": 0.3},
        {"mixing": "speculative", "teacher_mixed_alpha": 0.3, "lora": True, "advantage_baseline": "position"},
    ],
    ids=["full", "lora"],
)
def test_processes_do_not_matter(tmp_path: Path, options: dict):
    """Three buffers: their rows are found, sampled and scored ahead on each process."""
    options = {"overlap_rollouts": True, "max_steps": 9, "corpus": False, **options}
    reference = run(tmp_path, 8, 1, **options)
    found = train_distributed(tmp_path, 2, 4, 1, options)
    assert_same(found, reference)
    staleness = [log["rollout/staleness"] for log in found["history"] if "rollout/staleness" in log]
    assert staleness == [0.0, 1.0, 1.0]
