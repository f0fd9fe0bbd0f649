"""What `TeacherMixedTrainer` gives its parts, in training and in evaluation: budgets, samplers, rewards, metrics."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import minillm_trl.training.teacher_mixed_trainer as module
from minillm_trl.rollouts.rollout_sampler import SampledTurn, ScoredRows
from minillm_trl.training.rollout_in_progress import RolloutInProgress
from minillm_trl.training.teacher_mixed_trainer import TeacherMixedTrainer
from minillm_trl.training.turns import Turn, make_turn


def stand_in(*, training: bool = True, turn: int = 0, **parts) -> SimpleNamespace:
    """What methods of the trainer read, on one process, at optimizer step 4."""
    args = {"horizon_start": None, "horizon_steps": None, "seed": 7, "shared_coins": False, "teacher_mixed_alpha": 0.2}
    args |= {"sampling_batch_size": 3, "skd_top_k": 5, "per_device_train_batch_size": 1, "eval_batch_size": 2}
    args |= {"vllm_importance_sampling_correction": True, "lmbda": 1.0, "teacher_column": "teacher"}
    args |= parts.pop("args", {})
    rollout = RolloutInProgress(torch.ones(2, dtype=torch.bool), turn=turn, teacher_index=[1, 0], given=[None, None])
    defaults = {
        "args": SimpleNamespace(**args),
        "model": SimpleNamespace(training=training),
        "mode": "train" if training else "eval",
        "state": SimpleNamespace(global_step=4),
        "accelerator": Accelerator(cpu=True),
        "buffer": SimpleNamespace(micro_batches=2, kept_on_cpu=set()),
        "_teacher": SimpleNamespace(is_sharded=False),
        "_rollout": rollout,
        "_overlap": None,
        "num_generations_eval": 1,
        "max_completion_length": 12,
        "max_context": 16,
        "_collective_turns": False,
        "_compiled_decoding": None,
        "_drafts": None,
    }
    return SimpleNamespace(**{**defaults, **parts})


class TestTurns:
    @pytest.mark.parametrize(
        ("lengths", "parts", "expected"),
        [
            ([9, 15], {}, 12),  # a first turn: prompts were checked before
            ([9], {"turn": 1}, 7),
            ([3], {"turn": 1}, 12),
            ([4], {"turn": 1}, 12),
            ([5], {"turn": 1}, 11),
            ([3, 20], {"turn": 1}, 0),
            ([], {"turn": 1}, 12),
            ([20], {"turn": 1, "max_context": None}, 12),
            ([9], {"turn": 1, "_collective_turns": True}, 7),
            ([], {"turn": 1, "_collective_turns": True}, None),
            ([20], {"turn": 1, "_collective_turns": True}, 0),
            ([], {"turn": 0, "_collective_turns": True}, 12),
            ([3], {"args": {"horizon_start": 4, "horizon_steps": 8}}, 8),
            ([3], {"args": {"horizon_start": 4, "horizon_steps": 8}, "training": False}, 12),
            ([9], {"args": {"horizon_start": 4, "horizon_steps": 8}, "turn": 1}, 7),
            ([3], {"args": {"horizon_start": 4, "horizon_steps": 8}, "turn": 1}, 8),
        ],
    )
    def test_budget_is_the_horizon_within_the_context(self, lengths: list[int], parts: dict, expected: int | None):
        trainer = stand_in(**parts)
        assert TeacherMixedTrainer._turn_budget(trainer, [[5] * length for length in lengths]) == expected

    def test_budget_is_the_smallest_of_the_processes_that_have_prompts(self):
        gathered = []
        accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0)
        accelerator.gather = lambda own: gathered.append(own.tolist()) or torch.tensor([*own.tolist(), -1, 5, 9])
        trainer = stand_in(turn=1, _collective_turns=True, accelerator=accelerator)
        assert TeacherMixedTrainer._turn_budget(trainer, [[5] * 9]) == 5
        assert TeacherMixedTrainer._turn_budget(trainer, []) == 5
        assert gathered == [[7], [-1]]

    def test_later_turns_are_numbered_and_have_no_scores_and_no_teachers_of_rows(self):
        made = []

        def sample(turn: Turn, with_scores: bool) -> SampledTurn:
            made.append((turn, with_scores))
            return SampledTurn([[5], [6]], ScoredRows())

        trainer = stand_in(_sample_now=sample)
        for _ in range(3):
            assert TeacherMixedTrainer._sample_turn(trainer, [[1], [2]], 8) == [[5], [6]]
        turns = [turn for turn, _ in made]
        assert [with_scores for _, with_scores in made] == [True, False, False]
        places = ((0, [1, 0]), (1, []), (2, []))
        assert turns == [make_turn(trainer, [[1], [2]], 8, 4, number, teachers) for number, teachers in places]
        assert trainer._rollout.turn == 3

    def test_scores_are_moved_except_for_those_that_stay_on_the_cpu(self):
        """As rollouts may be sampled on another device than that of the updates."""
        scores = SimpleNamespace(to=lambda device, stay=(): (device, stay))
        sampled = SampledTurn([[5]], scores)
        buffer = SimpleNamespace(micro_batches=2, kept_on_cpu={"teacher_hidden_states"})
        trainer = stand_in(_sample_now=lambda *unused: sampled, buffer=buffer)
        TeacherMixedTrainer._sample_turn(trainer, [[1]], 8)
        assert trainer._rollout.scores == (torch.device("cpu"), {"teacher_hidden_states"})

    def test_rollout_that_was_sampled_ahead_is_for_training(self):
        ahead, now = ([[number]] for number in (1, 2))
        for training, taken, expected in ((True, ahead, ahead), (True, None, now), (False, ahead, now)):
            overlap = SimpleNamespace(take=lambda turn, taken=taken: taken and SampledTurn(taken, ScoredRows()))
            sample = lambda *unused: SampledTurn(now, ScoredRows())  # noqa: E731
            trainer = stand_in(training=training, _overlap=overlap, _sample_now=sample)
            assert TeacherMixedTrainer._sample_turn(trainer, [[1]], 8) == expected


class TestSampler:
    def make(self, **parts):
        named = {"_tokenizer": SimpleNamespace(pad_token_id=1), "scoring": SimpleNamespace(scorer="scorer")}
        every = {"eos_token_ids": [0, 3], "_on_every_process": "agree", "_compiled_decoding": "compiled"}
        parts = {"rollout_func": None, "_drafts": "drafts", **named, **every, **parts}
        return TeacherMixedTrainer._make_sampler(stand_in(**parts))

    @pytest.mark.parametrize(
        ("parts", "mixes"), [({}, True), ({"training": False}, False), ({"rollout_func": print}, False)]
    )
    def test_evaluation_and_rollout_functions_have_the_student_alone(self, parts: dict, mixes: bool):
        sampler = self.make(**parts)
        assert (sampler.alpha, sampler.drafts, sampler.skd_top_k) == (
            (0.2, "drafts", 5) if mixes else (0.0, None, None)
        )
        assert (sampler.eos_token_ids, sampler.pad_token_id, sampler.batch_size) == ([0, 3], 1, 3)
        assert (sampler.scorer, sampler.compiled, sampler.shared_coins) == ("scorer", "compiled", False)

    def test_processes_agree_for_a_sharded_teacher_alone(self):
        assert self.make().on_every_process is None
        assert self.make(_teacher=SimpleNamespace(is_sharded=True)).on_every_process == "agree"

    @pytest.mark.parametrize("drafts", [None, "drafts"])
    def test_engine_that_drafts_has_the_current_weights(self, monkeypatch, drafts: str | None):
        """The student samples in the way that was chosen, with its weights unwrapped."""
        order, student = [], torch.nn.Linear(1, 1)
        monkeypatch.setattr(module, "update_vllm", lambda trainer: order.append("weights"))
        monkeypatch.setattr(module, "unwrap_model_for_generation", lambda *unused, **options: nullcontext())
        sampler, chosen = SimpleNamespace(drafts=drafts), SimpleNamespace()
        trainer = stand_in(
            args={"gradient_checkpointing_kwargs": None},
            model_wrapped=student,
            _make_sampler=lambda: sampler,
            _sampling_model=lambda: nullcontext(student),
            _mixing=SimpleNamespace(applied_to=lambda *arguments: order.append(arguments) or chosen),
        )
        turn = SimpleNamespace(prompt_ids=[[5]], max_new_tokens=8, sample=lambda *arguments: arguments)
        found = TeacherMixedTrainer._sample_now(trainer, turn, False)
        assert found == (chosen, student, False, [None, None])
        assert order == [*(["weights"] if drafts else []), (sampler, student, [[5]], 8)]


def test_drafts_are_for_training_and_its_samples_need_no_correction():
    """An evaluation has TRL's samples, with GRPO's correction if the run asks for it."""
    for corrects, training in product((False, True), repeat=2):
        options = {"vllm_importance_sampling_correction": corrects}
        trainer = stand_in(training=training, args=options, _drafts="drafts", _grpo_scores_rollouts=True)
        trainer._teacher_names, trainer._decodes_with_trl = ["one", "two"], None
        rollout = TeacherMixedTrainer._begin_rollout(trainer, torch.tensor([True]), [{"teacher": "two"}])
        assert trainer._decodes_with_trl is not training
        assert trainer.vllm_importance_sampling_correction is (corrects and not training)
        assert (rollout.teacher_index, rollout.given, rollout.wants_old_logps) == ([1], [], True)
        assert trainer._rollout is rollout


@pytest.mark.parametrize(
    ("use_vllm", "corrects", "accumulation", "iterations", "expected"),
    [
        (False, True, 4, 1, False),
        (True, True, 4, 1, True),
        (True, False, 4, 1, False),
        (False, False, 3, 1, True),  # a rollout that lasts for two micro-batches ends within an optimizer step
        (False, False, 2, 2, True),
        (False, False, 4, 2, False),
        (True, True, 3, 1, True),
    ],
)
def test_log_probs_are_requested_where_weights_may_have_changed(
    use_vllm: bool, corrects: bool, accumulation: int, iterations: int, expected: bool
):
    trainer = stand_in(args={"gradient_accumulation_steps": accumulation}, use_vllm=use_vllm)
    trainer.vllm_importance_sampling_correction, trainer.num_iterations = corrects, iterations
    assert TeacherMixedTrainer._grpo_scores_rollouts.fget(trainer) is expected


class TestRewards:
    @pytest.mark.parametrize("training", [True, False])
    def test_fillers_of_an_evaluation_have_none_and_groups_are_of_the_mode(self, training: bool):
        """An infinite reward has the mean of its group: of four rows in training, and of two in an evaluation."""
        counts = torch.tensor([True, True, True, training])
        trainer = stand_in(training=training, num_generations=4, num_generations_eval=2)
        trainer._rollout = RolloutInProgress(counts)
        trainer._group = TeacherMixedTrainer._group.fget(trainer)
        rewards = TeacherMixedTrainer._note_rewards(trainer, torch.tensor([[torch.inf], [2.0], [3.0], [10.0]]))
        assert rewards[:3].tolist() == [[5.0 if training else 2.0], [2.0], [3.0]]
        assert rewards[3].isnan().item() is not training
        assert trainer._rollout.rewards.values is rewards
        assert trainer._rollout.rewards.infinite.flatten().tolist() == [True, False, False, False]

    @pytest.mark.parametrize("group", [1, 2])
    def test_advantages_are_added_to_the_teachers(self, group: int):
        trainer = stand_in(num_generations=group, reward_func_names=["length"], reward_weights=torch.ones(1))
        trainer._group = group
        trainer.advantages = SimpleNamespace(of_buffer=lambda rewards, weights, rows: torch.full((rows,), 7.0))
        TeacherMixedTrainer._note_rewards(trainer, torch.tensor([[1.0], [torch.inf]]))
        batch = {"advantages": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "faulty": torch.zeros(2, dtype=torch.bool)}
        found, faults = TeacherMixedTrainer._add_reward_advantages(trainer, batch, torch.tensor([10.0, 20.0]))
        added = [7.0, 7.0] if group == 1 else [10.0, 20.0]
        assert found["advantages"].tolist() == [[1.0 + added[0], 2.0 + added[0]], [3.0 + added[1], 4.0 + added[1]]]
        assert found["faulty"].tolist() == [False, True]
        assert faults == {1: "reward function length returned inf"}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_metrics_of_drafts_and_overlap_are_those_of_training(mode: str):
    added = {}

    def add(of: str, totals) -> None:
        assert of == mode
        added.update(zip(totals.names, totals.values.tolist(), strict=True))

    sources = [SimpleNamespace(take_totals=lambda name=name: {name: (1.0, 2.0)}) for name in ("drafts", "overlap")]
    trainer = stand_in(
        mode=mode,
        means=SimpleNamespace(add=add),
        rollout_metrics=SimpleNamespace(add_rollout=lambda *unused: None),
        eos_token_ids=[0],
        _drafts=sources[0],
        _overlap=sources[1],
        _compiled_decoding=SimpleNamespace(take_counts=lambda: (3.0, 4.0)),
    )
    TeacherMixedTrainer._log_rollouts(trainer, [], {})
    of_training = {"drafts": [1.0, 2.0], "overlap": [1.0, 2.0]} if mode == "train" else {}
    assert added == {"rollout/compiled_steps": [3.0, 4.0], **of_training}
    trainer._compiled_decoding = trainer._drafts = trainer._overlap = None
    added.clear()
    TeacherMixedTrainer._log_rollouts(trainer, [], {})
    assert added == {}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_student_or_its_copy_samples_in_eval_mode_with_the_precision_of_the_run(training: bool, copied: bool):
    student, copy = torch.nn.Linear(2, 2).train(training), torch.nn.Linear(2, 2).eval()

    def half(accelerator=None):
        return torch.autocast("cpu", torch.bfloat16)

    its = SimpleNamespace(refresh=lambda student: None, precision=half, model=copy, release=lambda: None)
    trainer = stand_in(
        _rollout_copy=its if copied else None, _student=student, accelerator=SimpleNamespace(autocast=half)
    )
    with TeacherMixedTrainer._sampling_model(trainer) as model:
        assert model is (copy if copied else student)
        assert not model.training
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    assert student.training is training
    assert student(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("compiled", [None, "compiled"])
def test_copy_frees_its_weights_after_sampling_unless_compiled_code_has_their_addresses(compiled: str | None):
    order = []
    copy = SimpleNamespace(
        refresh=lambda student: order.append(f"refresh {student}"),
        precision=lambda accelerator: nullcontext(),
        model="copy",
        release=lambda: order.append("release"),
    )
    overlap = SimpleNamespace(wait=lambda: order.append("wait"))
    trainer = stand_in(_rollout_copy=copy, _compiled_decoding=compiled, _overlap=overlap, _student="student")
    with TeacherMixedTrainer._sampling_model(trainer) as model:
        order.append(f"sample {model}")
    assert order == ["wait", "refresh student", "sample copy", *(["release"] if compiled is None else [])]


@pytest.mark.parametrize("compiled", [None, "compiled"])
@pytest.mark.parametrize(
    ("with_trl", "rollout_func", "tools", "decodes"),
    [
        (False, None, [], True),
        (True, None, [], False),
        (False, print, [], False),
        (False, print, [len], True),
        (True, print, [len], False),
        (True, None, [len], False),
        (False, None, [len], True),
    ],
)
def test_models_are_checked_for_the_turns_that_this_package_samples(
    monkeypatch, with_trl: bool, rollout_func, tools: list, decodes: bool, compiled: str | None
):
    """With tools, the turns after that of a rollout function too. The copy is freed unless compiled code needs it."""
    calls, released = [], []
    monkeypatch.setattr(module, "prepare_decoding", lambda *arguments: calls.append(arguments[3]) or compiled)
    copy = SimpleNamespace(release=lambda: released.append(True))
    trainer = stand_in(_decodes_with_trl=with_trl, rollout_func=rollout_func, tools=tools, _rollout_copy=copy)
    TeacherMixedTrainer._prepare_decoding(trainer, "student")
    assert calls == [decodes]
    assert trainer._compiled_decoding is compiled
    assert bool(released) is (compiled is None)
    trainer._rollout_copy = None
    TeacherMixedTrainer._prepare_decoding(trainer, "student")
