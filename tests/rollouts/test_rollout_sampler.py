"""The sampler of rollouts on its own, without a trainer: completions and their scores."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model

from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.rollout_sampler import RolloutSampler, ScoredRows
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.sampling import sample_prompts
from minillm_trl.rollouts.scores import RolloutScorer, RolloutScores
from minillm_trl.rollouts.several_teachers import SeveralTeachers
from minillm_trl.rollouts.teacher_replacement import sample_with_replacement

PROMPTS = [[5, 6, 7], [8], [9, 10]]
TEMPERATURE = 0.7


KEYS = [(0, row) for row in range(len(PROMPTS))]


def build_sampler(alpha: float, kept_on: str = "device", seed: int = 1) -> RolloutSampler:
    teacher = build_model("gpt2", 40, seed=seed, width=48)
    return RolloutSampler(
        RolloutTeacher(teacher, LMHead.of(teacher), Accelerator(cpu=True), batch_size=2, kept_on=kept_on),
        RolloutScorer(TEMPERATURE, TEMPERATURE, vocab_size=40),
        alpha=alpha,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=2,
    )


def sample(sampler: RolloutSampler, **options):
    student = build_model("gpt2", 40, seed=0)
    return student, sampler.sample(student, PROMPTS, KEYS, (0, 9), max_new_tokens=6, **options)


def plain_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_scores_are_those_of_plain_forward_passes(alpha: float):
    sampler = build_sampler(alpha)
    student, turn = sample(sampler)
    scores = turn.scores.assemble(torch.Size((len(PROMPTS), 8)))  # wider than any completion
    for row, (prompt, completion) in enumerate(zip(PROMPTS, turn.completions, strict=True)):
        expected = plain_logps(student, prompt, completion)
        torch.testing.assert_close(scores.student_logps[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)
        assert not scores.student_logps[row, len(completion) :].any()
        if alpha > 0:
            expected = plain_logps(sampler.teacher.model, prompt, completion)
            torch.testing.assert_close(scores.teacher_logps[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)
    assert (scores.teacher_logps is None) == (alpha == 0.0)  # the teacher has not run
    assert (scores.teacher_hidden_states is None) == (alpha == 0.0)
    assert scores.entropy is scores.student_top_ids is scores.expected_rewards is None  # not asked for


def test_turn_without_scores_has_the_same_completions():
    sampler = build_sampler(0.5)
    _, scored = sample(sampler)
    _, plain = sample(sampler, with_scores=False)
    assert plain.completions == scored.completions
    assert plain.scores.parts == []
    assert plain.scores.field("student_logps", torch.Size((3, 6))) is None


def test_states_are_copied_from_their_device_on_request_alone():
    states = torch.empty(2, 3, device="meta")  # which cannot be copied from
    assert build_sampler(0.5).teacher.keep(states) is states
    assert build_sampler(0.5, kept_on="recompute").teacher.keep(states) is None
    with pytest.raises(NotImplementedError):
        build_sampler(0.5, kept_on="cpu").teacher.keep(states)


def test_states_that_are_recomputed_are_not_kept():
    _, turn = sample(build_sampler(0.5, kept_on="recompute"))
    scores = turn.scores.assemble(torch.Size((3, 6)))
    assert scores.teacher_hidden_states is None
    assert scores.teacher_logps is not None


def of_two_teachers(alpha: float, **options) -> RolloutSampler:
    first, second = (build_sampler(alpha, seed=seed) for seed in (1, 2))
    phases = {name: nullcontext() for name in ("a", "b")}
    return replace(first, teacher=SeveralTeachers({"a": first.teacher, "b": second.teacher}, phases), **options)


def test_a_row_beside_given_ones_keeps_its_own_teacher():
    """With coins of its own, each row is what it is where no completion is given."""
    sampler = of_two_teachers(0.9, shared_coins=False)
    _, free = sample(sampler, teacher_index=[0, 1, 0])
    _, swapped = sample(sampler, teacher_index=[1, 0, 1])
    assert free.completions[1:] != swapped.completions[1:]
    _, turn = sample(sampler, teacher_index=[0, 1, 0], given=[[7, 8, 9, 10, 11, 12, 13], None, None])
    assert turn.completions == [[7, 8, 9, 10, 11, 12], *free.completions[1:]]


def of_sample_prompts(
    student, sampler: RolloutSampler, teacher, rows: list[int], coin_key: tuple[int, ...], **options
):
    """The completions of rows by a direct call with the settings of the sampler, each as an argument."""
    return sample_prompts(
        student,
        [PROMPTS[row] for row in rows],
        keys=[KEYS[row] for row in rows],
        max_new_tokens=6,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        temperature=TEMPERATURE,
        batch_size=2,
        teacher=teacher,
        alpha=sampler.alpha,
        coin_key=coin_key,
        shared_coins=sampler.shared_coins,
        mixing=sampler.mixing,
        vocab_size=sampler.scorer.vocab_size,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"shared_coins": False}, {"mixing": "speculative"}, {"alpha": 0.0}], ids=str)
def test_completions_are_those_of_the_settings(options: dict):
    """At the sampling temperature, over the vocabulary that is scored, in batches; every process is asked."""
    scorer, asked = RolloutScorer(TEMPERATURE, 1.6, vocab_size=12), []
    if "mixing" not in options:
        options = {**options, "on_every_process": lambda flag: asked.append(flag) or flag}
    sampler = replace(build_sampler(0.5), scorer=scorer, **options)
    student, turn = sample(sampler)
    batches: list[list[int]] = []
    expected = of_sample_prompts(
        student,
        sampler,
        sampler.teacher.model,
        [0, 1, 2],
        (0, 9),
        on_batch=lambda rows, _: batches.append(rows),
        on_every_process=sampler.on_every_process and (lambda flag: flag),
    )
    assert turn.completions == expected
    assert [rows for rows, _ in turn.scores.parts] == batches
    assert len(batches) == 2
    assert sampler.shared_coins == options.get("shared_coins", True)
    assert bool(asked) == ("on_every_process" in options)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_several_teachers_are_those_of_a_run_with_each(shared: bool):
    """Rows that share their coins have those of their teacher's number; states end with the number."""
    sampler, numbers = of_two_teachers(0.6, shared_coins=shared), [1, 0, 1]
    student, turn = sample(sampler, teacher_index=numbers)
    scores = turn.scores.assemble(torch.Size((len(PROMPTS), 8)))
    for number, member in enumerate(sampler.teacher.members.values()):
        rows = [row for row, own in enumerate(numbers) if own == number]
        coin_key = (0, 9, number) if shared else (0, 9)
        expected = of_sample_prompts(student, sampler, member.model, rows, coin_key)
        assert [turn.completions[row] for row in rows] == expected
        for row in rows:
            completion = turn.completions[row]
            logps = plain_logps(member.model, PROMPTS[row], completion)
            torch.testing.assert_close(scores.teacher_logps[row, : len(completion)], logps, rtol=1e-4, atol=1e-5)
            assert scores.teacher_hidden_states[row, : len(completion), -1].eq(number).all()
    _, plain = sample(sampler, teacher_index=numbers, with_scores=False)
    assert (plain.completions, plain.scores.parts) == (turn.completions, [])


def test_teachers_sample_within_their_phases_and_only_if_they_have_rows():
    sampler, inside, seen = of_two_teachers(0.9), [], []

    class Phase(nullcontext):
        def __enter__(self) -> None:
            inside.append(self.enter_result)

        def __exit__(self, *error: object) -> None:
            inside.pop()

    for name, member in sampler.teacher.members.items():
        member.model.base_model.register_forward_pre_hook(lambda *_, name=name: seen.append((name, *inside)))
    teachers = replace(sampler.teacher, phases={name: Phase(name) for name in ("a", "b")})
    sample(replace(sampler, teacher=teachers), teacher_index=[1, 0, 1])
    assert {*seen} == {("a", "a"), ("b", "b")}
    broken = replace(teachers, phases={"b": Phase("b")})  # entering the other one would fail
    _, turn = sample(replace(sampler, teacher=broken), teacher_index=[1, 1, 1])
    assert all(turn.completions)


def test_drafts_of_an_engine_and_compiled_steps_reach_sampling():
    """Which refuses them where they would have no effect."""
    with pytest.raises(ValueError, match="does not use drafts of an engine"):
        sample(replace(build_sampler(0.5), drafts=object()))
    with pytest.raises(ValueError, match="does not work with compiled"):
        sample(replace(build_sampler(0.5), mixing="speculative", compiled=object()))


def test_states_of_several_teachers_that_are_recomputed_are_not_kept():
    sampler = of_two_teachers(0.6)
    members = {name: replace(each, kept_on="recompute") for name, each in sampler.teacher.members.items()}
    _, turn = sample(replace(sampler, teacher=replace(sampler.teacher, members=members)), teacher_index=[1, 0, 1])
    scores = turn.scores.assemble(torch.Size((3, 6)))
    assert scores.teacher_hidden_states is None
    assert scores.teacher_logps is not None


def reward(teacher_kd: torch.Tensor, student_kd: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return (student.exp() * (teacher_kd - student_kd)).sum(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [(), [1, 0, 1]], ids=["one teacher", "several"])
def test_expected_rewards_run_the_teacher_where_sampling_did_not(numbers):
    sampler = of_two_teachers(0.0) if numbers else build_sampler(0.0)
    sampler = replace(sampler, scorer=RolloutScorer(TEMPERATURE, 1.6, 40, reward, measure_entropy=True))
    student, turn = sample(sampler, teacher_index=numbers)
    scores = turn.scores.assemble(torch.Size((3, 6)))
    teachers = [each.model for each in sampler.teacher.members.values()] if numbers else [sampler.teacher.model]
    for row, (prompt, completion) in enumerate(zip(PROMPTS, turn.completions, strict=True)):
        ids = torch.tensor([prompt + completion])
        q, p = (
            model(ids).logits[0, len(prompt) - 1 : -1] for model in (student, teachers[numbers[row] if numbers else 0])
        )
        expected = reward((p / 1.6).log_softmax(-1), (q / 1.6).log_softmax(-1), (q / TEMPERATURE).log_softmax(-1))
        torch.testing.assert_close(scores.expected_rewards[row, : len(completion)], expected, rtol=1e-4, atol=1e-4)
        own = plain_logps(teachers[numbers[row] if numbers else 0], prompt, completion)
        torch.testing.assert_close(scores.teacher_logps[row, : len(completion)], own, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_teacher_is_asked_about_the_likeliest_tokens_of_the_student():
    """With the tokens themselves, in their own order, and the number of the teacher of each row."""
    asked = []

    class Asked(RolloutTeacher):
        def hidden_states(self, ids, mask, length, student_top_ids=None, teacher_index=None):
            asked.append((ids[mask.bool()].tolist(), student_top_ids, teacher_index))
            return super().hidden_states(ids, mask, length)

    sampler = build_sampler(0.0)
    own = sampler.teacher
    teacher = Asked(own.model, own.head, own.accelerator, 2, "device", student_top_k=4)
    scorer = RolloutScorer(TEMPERATURE, TEMPERATURE, 40, reward, measure_entropy=True, student_top_k=4)
    student, turn = sample(replace(sampler, teacher=teacher, scorer=scorer), teacher_index=[0, 0, 1])
    parts = [rows for rows, _ in turn.scores.parts]
    for rows, (ids, top_ids, numbers) in zip(parts, asked, strict=True):
        assert ids == [token for row in rows for token in PROMPTS[row] + turn.completions[row]]
        assert numbers.tolist() == [[0, 0, 1][row] for row in rows]
        for row, found in zip(rows, top_ids, strict=True):
            prompt, completion = PROMPTS[row], turn.completions[row]
            logits = student(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            assert found[: len(completion)].tolist() == logits.topk(4).indices.tolist()
    count = len(asked)
    sample(replace(sampler, teacher=teacher, scorer=scorer, alpha=0.5))
    assert len(asked) == count  # sampling has computed the states


def test_corrected_completions_are_those_of_drafts_of_the_student_alone():
    sampler = replace(build_sampler(0.9), skd_top_k=2)
    student, turn = sample(sampler)

    def draft(texts, places, limit: int) -> list[list[int]]:
        options = {"eos_token_ids": [0, 3], "pad_token_id": 1, "temperature": TEMPERATURE}
        return sample_prompts(student, texts, keys=places, max_new_tokens=limit, **options)

    expected = sample_with_replacement(
        draft,
        sampler.teacher,
        sampler.scorer,
        PROMPTS,
        KEYS,
        top_k=2,
        max_new_tokens=6,
        eos_token_ids=[0, 3],
        pad_token_id=1,
    )
    assert (turn.completions, turn.scores.parts) == (expected, [])
    _, plain = sample(build_sampler(0.0))
    assert plain.completions != expected


def test_corrected_rows_of_several_teachers_are_those_of_each():
    sampler = replace(of_two_teachers(0.0), skd_top_k=2)
    _, turn = sample(sampler, teacher_index=[1, 0, 1])
    for number, seed in enumerate((1, 2)):
        _, alone = sample(replace(build_sampler(0.0, seed=seed), skd_top_k=2))
        for row in range(3):
            assert (turn.completions[row] == alone.completions[row]) or [1, 0, 1][row] != number


def test_given_completions_keep_their_places_and_those_of_the_other_rows():
    """Rows to sample for have their own prompts and keys, and a completion may be empty."""
    sampler = replace(build_sampler(0.5), shared_coins=False)
    _, free = sample(sampler)
    for given in ([None, [7, 8], None], [[], None, None], [[7] * 6, [8] * 7, None]):
        _, turn = sample(sampler, given=given)
        expected = [own if ids is None else ids[:6] for own, ids in zip(free.completions, given, strict=True)]
        assert (turn.completions, turn.scores.parts) == (expected, [])
    _, turn = sample(sampler, given=[None, None, None])
    assert turn.completions == free.completions
    assert turn.scores.parts


def test_scores_move_except_for_the_fields_that_stay():
    parts = [([1], RolloutScores(torch.ones(1, 2), teacher_hidden_states=torch.ones(1, 2, 3)))]
    moved = ScoredRows(parts).to(torch.device("meta"), stay=["teacher_hidden_states"])
    ((rows, scores),) = moved.parts
    assert rows == [1]
    assert scores.student_logps.is_meta
    assert not scores.teacher_hidden_states.is_meta
    ((_, scores),) = ScoredRows(parts).to(torch.device("meta")).parts
    assert scores.teacher_hidden_states.is_meta


def test_field_that_a_part_lacks_is_none():
    both = [([0], RolloutScores(torch.ones(1, 2))), ([1], RolloutScores(None, torch.ones(1, 1)))]
    rows = ScoredRows(both)
    assert rows.field("student_logps", torch.Size((2, 2))) is None
    assert ScoredRows(both[:1]).field("student_logps", torch.Size((2, 3))).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert ScoredRows().field("student_logps", torch.Size((2, 3))) is None
    assert ScoredRows().parts is not ScoredRows().parts
