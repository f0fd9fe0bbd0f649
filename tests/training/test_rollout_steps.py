"""Steps of a rollout and of the loss in `TeacherMixedTrainer`, on stand-ins for its parts."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import minillm_trl.training.teacher_mixed_trainer as module
from minillm_trl.rollouts.rollout_sampler import ScoredRows
from minillm_trl.rollouts.scores import RolloutScores
from minillm_trl.training.rollout_in_progress import RolloutInProgress
from minillm_trl.training.teacher_mixed_trainer import TeacherMixedTrainer


class TestMakeRollout:
    @pytest.mark.parametrize(
        ("served", "batches", "saves"), [(True, ["batch"], True), (True, None, False), (False, ["batch"], False)]
    )
    def test_run_is_saved_if_servers_fail_unless_there_is_nothing_to_save(self, monkeypatch, served, batches, saves):
        """A run without a buffer has just started or resumed."""
        entered = []

        @contextmanager
        def saving(trainer):
            entered.append(trainer)
            yield

        monkeypatch.setattr(module, "saving_checkpoint", saving)
        trainer = SimpleNamespace(
            buffer=SimpleNamespace(batches=batches),
            _teacher=SimpleNamespace(is_served=served),
            _generate_and_score_completions=lambda rows: {"rows": rows},
            counts=SimpleNamespace(leave_out_faulty=lambda batch: {**batch, "masked": True}),
            _overlap=None,
        )
        assert TeacherMixedTrainer._make_rollout(trainer, ["row"]) == {"rows": ["row"], "masked": True}
        assert entered == ([trainer] if saves else [])

    @pytest.mark.parametrize("last", [False, True])
    def test_next_rollout_is_started_when_this_one_is_scored_unless_the_run_ends(self, monkeypatch, last: bool):
        order = []
        turn = SimpleNamespace(prompt_ids=[[5]], max_new_tokens=8)
        monkeypatch.setattr(module, "next_turn", lambda trainer: None if last else turn)

        def start(student, turn, sample) -> None:
            order.append((student, turn, sample("copy", turn)))

        trainer = SimpleNamespace(
            buffer=SimpleNamespace(batches=None),
            _teacher=SimpleNamespace(is_served=False),
            _generate_and_score_completions=lambda rows: order.append("scored") or {},
            counts=SimpleNamespace(leave_out_faulty=lambda batch: batch),
            scoring=SimpleNamespace(sample_ahead=lambda *arguments: arguments),
            _student="student",
            _make_sampler=lambda: "sampler",
            _mixing=SimpleNamespace(applied_to=lambda *arguments: arguments),
            _overlap=SimpleNamespace(start=start),
        )
        TeacherMixedTrainer._make_rollout(trainer, ["row"])
        chosen = ("sampler", "student", [[5]], 8)
        assert order == ["scored", *([] if last else [("student", turn, (chosen, "copy", turn))])]


class TestOldLogps:
    MASK = torch.tensor([[True, True, True], [True, False, False]])

    def trainer(self, parts: list) -> SimpleNamespace:
        rollout = RolloutInProgress(torch.ones(2), scores=ScoredRows(parts), teacher_index=[1, 0])
        scores = RolloutScores(student_logps=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]))
        asked = []
        of_student = lambda *arguments: asked.append(arguments) or scores  # noqa: E731
        scoring = SimpleNamespace(of_student=of_student)
        return SimpleNamespace(_rollout=rollout, scoring=scoring, model="model", asked=asked)

    def test_are_those_of_sampling_if_it_computed_them(self):
        trainer = self.trainer([([1], RolloutScores(student_logps=torch.tensor([[-7.0]])))])
        trainer._rollout.scores.parts.append(([0], RolloutScores(student_logps=torch.tensor([[-8.0, -9.0, -5.0]]))))
        found = TeacherMixedTrainer._old_logps(trainer, "ids", "attention", self.MASK)
        assert found.tolist() == [[-8.0, -9.0, -5.0], [-7.0, 0.0, 0.0]]
        assert trainer.asked == []

    def test_are_computed_once_and_kept_for_scoring(self):
        trainer = self.trainer([])
        for _ in range(2):
            found = TeacherMixedTrainer._old_logps(trainer, "ids", "attention", self.MASK)
            assert found.tolist() == [[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]
        ((*arguments, numbers),) = trainer.asked
        assert arguments == ["model", "ids", "attention", self.MASK]
        assert numbers.tolist() == [1, 0]
        ((rows, _),) = trainer._rollout.scores.parts
        assert rows == [0, 1]


@pytest.mark.parametrize("divergence", [None, torch.tensor([[3.0, 5.0, 100.0]])])
def test_corpus_has_its_share_of_the_optimizer_step_and_the_means_of_its_terms(divergence):
    """Two of three tokens count; the step has ten on two processes."""
    added = {}

    def add(mode: str, totals) -> None:
        assert mode == "train"
        added.update(zip(totals.names, totals.values.tolist(), strict=True))

    trainer = SimpleNamespace(
        means=SimpleNamespace(add=add), mode="train", accelerator=SimpleNamespace(num_processes=2)
    )
    lm = {"loss_mask": torch.tensor([[True, True, False]]), "window_tokens": torch.tensor(10)}
    scores = SimpleNamespace(loss=torch.tensor(20.0), logps=torch.tensor([[-1.0, -2.0, -50.0]]), divergence=divergence)
    assert TeacherMixedTrainer._lm_loss(trainer, lm, scores).item() == 4.0
    expected = {"objective/lm_cross_entropy": [3.0, 2.0]}
    assert added == expected | ({} if divergence is None else {"objective/lm_forward_kl": [8.0, 2.0]})


def test_empty_completions_of_a_rollout_function_are_padded_and_remembered():
    trainer = SimpleNamespace(_rollout=RolloutInProgress(torch.ones(3)), _tokenizer=SimpleNamespace(pad_token_id=1))

    def sample(prompts: list, given: SimpleNamespace) -> dict[str, list]:
        assert given is trainer
        return {"completion_ids": [[5], [], [6, 7]][: len(prompts)], "extra": [1, 2, 3]}

    filled = TeacherMixedTrainer._fill_empty_completions(trainer, sample)
    assert filled(["a", "b", "c"], trainer) == {"completion_ids": [[5], [1], [6, 7]], "extra": [1, 2, 3]}
    assert trainer._rollout.empty_rows == [1]
    filled(["a"], trainer)
    assert trainer._rollout.empty_rows == []


@pytest.mark.parametrize(("others", "expected"), [([1, 1], [True, False]), ([1, 0], [False, False])])
def test_flag_is_true_if_it_is_on_every_process(others: list[int], expected: list[bool]):
    def reduce(own: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return own + sum(others)

    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=3, reduce=reduce)
    trainer = SimpleNamespace(accelerator=accelerator)
    assert [TeacherMixedTrainer._on_every_process(trainer, flag) for flag in (True, False)] == expected


class TestPromptLengths:
    ROWS = Dataset.from_dict({"prompt": ["a", "b"]})

    @pytest.mark.parametrize(
        ("changes", "checked"),
        [
            ({}, ["a", "b"]),
            ({"eval_dataset": Dataset.from_dict({"prompt": ["c"]})}, ["a", "b", "c"]),
            ({"eval_dataset": {"one": Dataset.from_dict({"prompt": ["c"]}), "two": None}}, ["a", "b", "c"]),
            ({"train_dataset": ROWS.to_iterable_dataset()}, []),  # which is checked in each rollout
            ({"tools": [len]}, []),
            ({"environments": ["a room"]}, []),
            ({"max_context": None}, []),
        ],
    )
    def test_all_prompts_that_are_known_are_checked(self, changes: dict, checked: list[str]):
        found = []
        parts = {"train_dataset": self.ROWS, "eval_dataset": None, "max_context": 8, "tools": [], "environments": None}
        trainer = SimpleNamespace(**{**parts, **changes}, _tokenize_prompts=found.extend)
        TeacherMixedTrainer._check_prompt_lengths(trainer)
        assert found == checked
