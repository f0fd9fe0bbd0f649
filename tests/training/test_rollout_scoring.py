"""`RolloutScoring`: the training batch of given scores, and the passes that it makes for missing ones."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_tokenizer
from test_trainer import make_config

from minillm_trl.errors import UserError
from minillm_trl.rollouts.rollout_sampler import SampledTurn, ScoredRows
from minillm_trl.rollouts.scores import RolloutScores
from minillm_trl.training.rollout_rewards import RolloutAdvantages
from minillm_trl.training.rollout_scoring import RolloutScoring, make_scorer
from minillm_trl.training.turns import Turn

TOKENIZER = build_tokenizer()
STUDENT = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -9.0]])
TEACHER = torch.tensor([[-2.0, -1.0, -0.25], [-1.0, -6.0, -9.0]])
KD = 0.5  # added to both log-probs at the KD temperature of the student's, and half of it to the teacher's


class Teacher:
    """A teacher whose hidden states are zeros, and which records what it is asked."""

    def __init__(self, served: bool = False, top_k: int = 0):
        self.is_served, self.student_top_k, self.asked, self.checked = served, top_k, [], 0

    def raise_failures(self) -> None:
        self.checked += 1

    def hidden_states(self, ids, attention_mask, length: int, top_ids=None, teacher_index=None) -> torch.Tensor:
        assert attention_mask.shape == ids.shape
        self.asked.append((ids.tolist(), length, top_ids, teacher_index))
        return torch.zeros(*ids.shape[:1], length, 2)

    def head_on(self, device: torch.device) -> str:
        return "head"

    def keep(self, states: torch.Tensor | None) -> torch.Tensor | None:
        return None if states is None else states + 1.0

    def hidden_states_of(self, batch: dict) -> str:
        return "states"


class Scorer:
    """Log-probs that are the tokens' numbers over 10, negative; of the teacher twice as much."""

    expected_reward, measure_entropy, vocab_size = None, False, 300

    def score(self, ids, mask, student=None, teacher=None) -> RolloutScores:
        values = (-ids / 10.0).masked_fill(~mask, 0.0)
        if teacher is None:
            return RolloutScores(student_logps=values, student_kd_logps=values)
        assert teacher.head == "head"
        return RolloutScores(teacher_logps=2 * values, teacher_kd_logps=2 * values)


def batch(**more) -> dict[str, torch.Tensor]:
    return {
        "prompt_ids": torch.tensor([[1, 20], [21, 22]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[30, 31, 32], [33, 34, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        **more,
    }


def sampled(**more: torch.Tensor) -> ScoredRows:
    """Scores that sampling computed, in two parts, the second of which is shorter."""
    scores = {
        "student_logps": STUDENT,
        "teacher_logps": TEACHER,
        "student_kd_logps": STUDENT + KD,
        "teacher_kd_logps": TEACHER + KD / 2,
        **more,
    }
    return ScoredRows(
        [
            ([1], RolloutScores(**{name: values[1:, :2] for name, values in scores.items()})),
            ([0], RolloutScores(**{name: values[:1] for name, values in scores.items()})),
        ]
    )


def scoring(tmp_path, teacher: Teacher | None = None, **options) -> RolloutScoring:
    args = make_config(tmp_path, length_normalization=False, **options)
    accelerator = Accelerator(cpu=True)
    parts = (teacher or Teacher(), Scorer(), RolloutAdvantages(args, accelerator), TOKENIZER)
    return RolloutScoring(args, accelerator, *parts)


class TestTrainingBatch:
    @pytest.mark.parametrize("alpha", [0.0, 0.3])
    def test_values_of_rewards_ratios_and_weights(self, tmp_path, alpha: float):
        """Log-ratios -1.25, 0.75 and 0 are halved and cut at 0.5; that of the second row's second token is -5.25."""
        made = scoring(tmp_path, reward_scale=2.0, reward_clip=0.5, importance_weighting="prefix")
        found, faults, baseline = made.training_batch(None, batch(), alpha, sampled=sampled())
        assert (faults, baseline) == ({}, None)
        # the rewards of the tokens ahead, of -0.5, 0.375, 0 and 0.5, -0.5
        assert found["advantages"].tolist() == [[0.375, 0.0, 0.0], [-0.5, 0.0, 0.0]]
        mask = batch()["completion_mask"].bool()
        mixture = torch.log(alpha * TEACHER.exp() + (1 - alpha) * STUDENT.exp())
        torch.testing.assert_close(found["old_per_token_logps"][mask], mixture[mask])
        ratio = ((STUDENT - mixture) * mask).cumsum(dim=1)
        torch.testing.assert_close(found["long_term_weights"], ratio.exp())
        torch.testing.assert_close(found["single_step_weights"], (ratio - (STUDENT - mixture) * mask).exp())
        assert torch.equal(found["student_logps"][mask], STUDENT[mask])
        assert found["faulty"].tolist() == [False, False]
        assert {name: found[name] for name in batch()}.keys() <= found.keys()
        assert not {"teacher_hidden_states", "sampled_reverse_kl", "token_weights"} & found.keys()
        assert made.teacher.asked == []
        assert made.teacher.checked == 1

    def test_policy_that_sampled_otherwise_is_the_behavior(self, tmp_path):
        behavior = torch.full((2, 3), -1.5, requires_grad=True)
        made = scoring(tmp_path, importance_weighting="prefix", importance_weight_cap=1.2)
        found = made.training_batch(None, batch(), 0.3, behavior, sampled=sampled()).batch
        assert torch.equal(found["old_per_token_logps"], behavior)
        assert not found["old_per_token_logps"].requires_grad
        weights = [[math.exp(0.5), math.exp(0.0), math.exp(1.0)], [math.exp(-1.5), math.exp(-1.0), math.exp(-1.0)]]
        expected = [[min(weight, 1.2) for weight in row] for row in weights]
        torch.testing.assert_close(found["long_term_weights"], torch.tensor(expected))

    def test_faulty_rows_are_marked_and_explained(self, tmp_path):
        """A clip would hide that the teacher gives a token probability zero."""
        impossible = TEACHER.index_put((torch.tensor([1]), torch.tensor([1])), torch.tensor(-torch.inf))
        made = scoring(tmp_path, reward_clip=0.5, iw_opd_gamma=0.5)
        found, faults, _ = made.training_batch(
            None, batch(), 0.3, sampled=sampled(teacher_kd_logps=impossible, teacher_logps=impossible)
        )
        assert list(faults) == [1]
        assert "the teacher gives probability zero at token 34" in faults[1]
        assert found["faulty"].tolist() == [False, True]
        assert found["advantages"][1].tolist() == [0.0, 0.0, 0.0]
        assert found["advantages"][0].any()
        assert found["token_weights"].shape == (2, 3)

    def test_expected_rewards_take_the_place_of_those_ahead_and_their_faults_count(self, tmp_path):
        expected = torch.tensor([[1.0, 2.0, 4.0], [torch.inf, 1.0, 1.0]])
        made = scoring(tmp_path, reward_estimator="expected")
        found, faults, totals = made.training_batch(
            None, batch(), 0.0, baseline="position", sampled=sampled(expected_rewards=expected)
        )
        assert list(faults) == [1]
        assert found["advantages"][0].tolist() == [6.0, 4.0, 0.0]  # no other row has a baseline
        assert totals is not None

    @pytest.mark.parametrize("kept", [False, True])
    def test_states_of_the_teacher_are_in_the_batch_if_they_are_kept(self, tmp_path, kept: bool):
        states = {"teacher_hidden_states": torch.arange(12.0).view(2, 3, 2)} if kept else {}
        found = scoring(tmp_path).training_batch(None, batch(), 0.3, sampled=sampled(**states)).batch
        assert ("teacher_hidden_states" in found) is kept
        if kept:
            assert torch.equal(found["teacher_hidden_states"][0], states["teacher_hidden_states"][0])

    def test_teacher_with_another_tokenizer_scores_spans(self, tmp_path):
        """Its rewards are cut at the clip times the tokens of a span."""
        made, asked = scoring(tmp_path, reward_clip=0.5, teacher_mixed_alpha=0.0), []
        spans = SimpleNamespace(
            teacher=torch.tensor([[0.0, -9.0, -1.0], [-1.0, 0.0, 0.0]]),
            student=torch.tensor([[0.0, -1.0, -0.75], [-torch.inf, 0.0, 0.0]]),
            lengths=torch.tensor([[1, 4, 1], [1, 1, 1]]),
            faults={1: "cannot be read"},
        )
        made.spans = SimpleNamespace(score=lambda *arguments: asked.append(arguments) or spans)
        alone = ScoredRows([([0, 1], RolloutScores(student_logps=STUDENT, student_kd_logps=STUDENT + KD))])
        found, faults, _ = made.training_batch(None, batch(), 0.0, sampled=alone, prompts=["a", "b"])
        assert torch.equal(asked[0][1], STUDENT + KD)
        assert asked[0][2] == ["a", "b"]
        assert faults == {1: "cannot be read"}
        assert found["advantages"][0].tolist() == [-2.25, -0.25, 0.0]
        assert found["sampled_reverse_kl"].tolist() == [[0.0, 8.0, 0.25], [0.0, 0.0, 0.0]]
        torch.testing.assert_close(found["old_per_token_logps"], STUDENT)  # the student alone samples
        assert made.teacher.asked == []


class Student(torch.nn.Module):
    """A model that answers requests with log-probs that are the tokens' numbers over 10, negative."""

    is_gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.requests = []

    def forward(self, score_requests) -> list[RolloutScores]:
        assert not self.training
        assert not torch.is_grad_enabled()
        (request,) = score_requests
        self.requests.append(request)
        ids = request.input_ids[:, -request.completion_mask.shape[1] :]
        top_ids = ids[..., None].expand(-1, -1, 2) if request.scorer == "lister" else None
        logps = (-ids / 10.0).masked_fill(~request.completion_mask, 0.0)
        return [RolloutScores(student_logps=logps, student_kd_logps=logps, student_top_ids=top_ids)]


class TestPasses:
    def test_scores_that_sampling_did_not_compute_come_from_a_pass_of_each_model(self, tmp_path):
        made, student = scoring(tmp_path), Student()
        index = torch.tensor([1, 0])
        scores = made.of_rollout(student, batch(teacher_index=index), ScoredRows())
        expected = torch.tensor([[-3.0, -3.1, -3.2], [-3.3, -3.4, 0.0]])
        torch.testing.assert_close(scores.student_logps, expected)
        torch.testing.assert_close(scores.teacher_logps, 2 * expected)
        torch.testing.assert_close(scores.teacher_kd_logps, 2 * expected)
        assert torch.equal(scores.teacher_hidden_states, torch.ones(2, 3, 2))
        ((ids, length, top_ids, teacher_index),) = made.teacher.asked
        assert ids == [[1, 20, 30, 31, 32], [21, 22, 33, 34, 1]]
        assert (length, top_ids) == (3, None)
        assert teacher_index is index
        assert student.training

    @pytest.mark.parametrize("rows", [1, 2, 3, 4])
    @pytest.mark.parametrize("training", [True, False])
    def test_parts_of_a_pass_have_a_micro_batchs_rows_without_common_padding(
        self, tmp_path, rows: int, training: bool
    ):
        made, student = scoring(tmp_path, per_device_train_batch_size=rows), Student().train(training)
        mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
        prompt = torch.tensor([[1, 1], [0, 1], [0, 1], [1, 1]])
        ids = torch.arange(20).view(4, 5)
        states = torch.arange(24.0).view(4, 3, 2)
        attention_mask = torch.cat([prompt, mask], dim=1)
        request = SimpleRequest(ids, attention_mask, mask.bool(), "scorer", states)
        found = made.without_gradient(student, request)
        torch.testing.assert_close(found.student_logps, -ids[:, 2:] / 10.0 * mask)
        assert student.training is training
        assert [len(part.input_ids) for part in student.requests] == [rows] * (4 // rows) + [4 % rows] * bool(4 % rows)
        widths = [part.input_ids.shape[1] for part in student.requests]
        assert widths == {1: [5, 4, 3, 3], 2: [5, 4], 3: [5, 3], 4: [5]}[rows]
        for part in student.requests:
            assert part.input_ids.shape == part.attention_mask.shape
            assert part.teacher_hidden_states.shape[:2] == part.completion_mask.shape
            first = [int(row[-part.completion_mask.shape[1]]) for row in part.input_ids]
            assert [float(row[0, 0]) for row in part.teacher_hidden_states] == [6.0 * (id_ // 5) for id_ in first]

    def test_served_teacher_is_asked_for_the_tokens_that_the_student_lists(self, tmp_path):
        """Expected rewards need both distributions in the pass of the student."""
        for top_k in (0, 2):
            made, student = scoring(tmp_path, Teacher(top_k=top_k), reward_estimator="expected"), Student()
            made.scorer = make_scorer(made.args, 1.0, 300, top_k)
            student.forward = listing(student)
            ids = torch.tensor([[20, 30, 31]])
            mask = torch.tensor([[True, True]])
            scores = made.of_student(student, ids, torch.ones_like(ids), mask, torch.tensor([0]))
            assert torch.equal(scores.teacher_hidden_states, torch.ones(1, 2, 2))
            ((asked, length, top_ids, teacher_index),) = made.teacher.asked
            assert (asked, length) == (ids.tolist(), 2)
            assert teacher_index.tolist() == [0]
            if top_k:
                assert top_ids.tolist() == [[[30], [31]]]
                lister, scorer = (request.scorer for request in student.requests)
                assert (lister.expected_reward, lister.measure_entropy, lister.student_top_k) == (None, False, 2)
                assert scorer is made.scorer
                assert student.requests[0].teacher_hidden_states is None
            else:
                assert top_ids is None
                assert len(student.requests) == 1
            assert torch.equal(student.requests[-1].teacher_hidden_states, torch.zeros(1, 2, 2))

    def test_models_are_scored_under_the_precision_of_the_run(self, tmp_path):
        made, found = scoring(tmp_path), []
        made.accelerator = SimpleNamespace(
            device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.bfloat16)
        )
        weight = torch.ones(2, 2)

        def model(score_requests) -> list[str]:
            found.append((weight @ weight).dtype)
            return ["scores" for _ in score_requests]

        assert made.answer(model, "one", "other") == ["scores", "scores"]
        score = made.scorer.score
        made.scorer.score = lambda *arguments, **more: (
            found.append((weight @ weight).dtype) or score(*arguments, **more)
        )
        made.add_teacher(batch(), RolloutScores(student_logps=STUDENT))
        assert found == [torch.bfloat16, torch.bfloat16]

    def test_tokens_outside_the_shared_vocabulary_are_refused(self, tmp_path):
        ids, mask = torch.tensor([[500, 30, 300]]), torch.tensor([[True, True]])
        made = scoring(tmp_path)
        with pytest.raises(UserError, match="has the token 300"):
            made.of_student(Student(), ids, torch.ones_like(ids), mask)
        mask[0, 1] = False  # as a prompt's, a token that is not trained may be any
        assert made.of_student(Student(), ids, torch.ones_like(ids), mask).student_logps[0, 0] == -3.0


class SimpleRequest(SimpleNamespace):
    """Stands for a `RolloutRequest`, whatever its scorer."""

    NAMES = ("input_ids", "attention_mask", "completion_mask", "scorer", "teacher_hidden_states")

    def __init__(self, *values: object):
        super().__init__(**dict(zip(self.NAMES, values, strict=True)))

    def _replace(self, **changes: object) -> "SimpleRequest":
        return SimpleRequest(*({**vars(self), **changes}[name] for name in self.NAMES))


def listing(student: Student):
    """The forward pass of a student that lists each token itself as its most likely one."""

    def forward(score_requests) -> list[RolloutScores]:
        (request,) = score_requests
        student.requests.append(request)
        ids = request.input_ids[:, -request.completion_mask.shape[1] :]
        return [RolloutScores(student_logps=-ids / 10.0, student_top_ids=ids[..., None])]

    return forward


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_rollout_that_is_sampled_ahead_is_scored_unless_the_teacher_is_served(tmp_path, served: bool, scored: bool):
    made = scoring(tmp_path, Teacher(served))
    turn = Turn([[20], [21, 22]], [(1,), (2,)], (3,), 4, [1, 0])
    logps = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    of_teacher = {"teacher_logps": logps - 1.0, "teacher_kd_logps": logps - 1.0} if scored else {}
    rows = ScoredRows([([0, 1], RolloutScores(student_logps=logps, student_kd_logps=logps, **of_teacher))])
    turned = SampledTurn([[30, 31], [33]], rows)
    sampler = SimpleNamespace(sample=lambda *unused: turned, pad_token_id=1)
    found = made.sample_ahead(sampler, SimpleNamespace(device=torch.device("cpu")), turn)
    assert found.completions == [[30, 31], [33]]
    if served:
        assert found is turned
        return
    ((numbers, scores),) = found.scores.parts
    assert numbers == [0, 1]
    expected = logps - 1.0 if scored else torch.tensor([[-6.0, -6.2], [-6.6, 0.0]])
    torch.testing.assert_close(scores.teacher_logps, expected)
    torch.testing.assert_close(scores.student_logps, logps)
    assert len(made.teacher.asked) == (not scored)
    if not scored:
        assert made.teacher.asked[0][0] == [[1, 20, 30, 31], [21, 22, 33, 1]]
        assert made.teacher.asked[0][3].tolist() == [1, 0]


def test_teacher_with_another_tokenizer_has_no_states_and_reads_prompts(tmp_path):
    made, checked = scoring(tmp_path), []
    made.check_prompts(["a"])
    assert made.teacher_states(batch()) == "states"
    made.spans = SimpleNamespace(check_prompts=checked.append)
    assert made.teacher_states(batch()) is None
    made.check_prompts(["a"])
    assert checked == [["a"]]
    lacking = RolloutScores(student_logps=STUDENT)
    assert made.add_teacher(batch(), lacking) is lacking


def test_scorer_has_the_temperatures_and_the_scale_of_the_run(tmp_path):
    plain = make_scorer(make_config(tmp_path), 0.7, 50, 3)
    assert (plain.temperature, plain.kd_temperature, plain.vocab_size, plain.student_top_k) == (0.7, 0.7, 50, 3)
    assert (plain.expected_reward, plain.measure_entropy) == (None, False)
    options = {"kd_temperature": 2.0, "top_entropy_quantile": 0.5, "reward_estimator": "expected"}
    made = make_scorer(make_config(tmp_path, **options, reward_scale=2.0, reward_clip=0.5), 0.7, 50, 0)
    assert (made.kd_temperature, made.measure_entropy) == (2.0, True)
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    terms = [0.25 * min(math.log(2.0) / 2, 0.5), 0.75 * math.log(0.5 / 0.75) / 2]
    assert made.expected_reward(teacher, student, student).item() == pytest.approx(sum(terms))
    sure, never = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[1e-9, 1.0]]).log()
    assert made.expected_reward(never, sure, sure).item() == pytest.approx(-0.45 + 0.05, abs=1e-3)
