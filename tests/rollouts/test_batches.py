"""What `sample_prompts` and `sample_completions` do with their arguments: batches, padding, flags and errors."""

from itertools import count

import numpy as np
import pytest
import torch
from conftest import build_model
from kept_states import check_kept_states

from minillm_trl.errors import UserError
from minillm_trl.rollouts.compiled_steps import CompiledDecoding, Reader
from minillm_trl.rollouts.engine_drafts import EngineDrafts
from minillm_trl.rollouts.keyed_random import keyed_uniforms, toss_coins
from minillm_trl.rollouts.sampling import Completions, left_pad, sample_completions, sample_prompts

PROMPTS = [[5 + i, *range(6, 6 + (3 * i) % 11)] for i in range(12)]
KEYS = [(7, sum(prompt)) for prompt in PROMPTS]
PAD = 1


def build_pair(family: str = "gpt2"):
    return [build_model(family, vocab_size=50, seed=seed, width=16, layers=1) for seed in (0, 1)]


def sample(student, teacher, prompts=PROMPTS, keys=KEYS, **options) -> list[list[int]]:
    common = {"max_new_tokens": 24, "eos_token_ids": [0, 3], "pad_token_id": PAD, "teacher": teacher}
    return sample_prompts(student, prompts, keys=keys, **{**common, **options})


def test_padding_is_the_pad_token_and_masked_out():
    batches: list[tuple[list[int], Completions]] = []
    completions = sample(*build_pair(), on_batch=lambda *batch: batches.append(batch))
    ((rows, sampled),) = batches  # without a batch size, all rows are one batch
    assert rows == sorted(range(12), key=lambda row: -len(PROMPTS[row]))
    assert sampled.ids.shape == sampled.mask.shape == (12, max(map(len, completions)))
    for row, ids, mask in zip(rows, sampled.ids.tolist(), sampled.mask.tolist(), strict=True):
        completion, count = completions[row], len(completions[row])
        assert ids == completion + [PAD] * (len(ids) - count)
        assert mask == [True] * count + [False] * (len(ids) - count)
    assert sampled.student_hidden_states is sampled.teacher_hidden_states is None


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "mixing": "speculative"}], ids=["student", "speculative"])
def test_without_prompts_nothing_is_sampled(options: dict):
    student, teacher = build_pair()
    student.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the student has run"))
    assert sample(student, teacher, prompts=[], keys=[], on_batch=pytest.fail, **options) == []


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, False),
        ({"alpha": 0.5, "shared_coins": False}, False),
        ({"alpha": 0.5, "mixing": "speculative"}, False),
        ({"alpha": 0.5}, True),
        ({"on_every_process": bool}, True),
        ({"compiled": "eager"}, True),
    ],
    ids=str,
)
def test_rows_that_are_not_tied_take_the_slots_of_those_that_end(
    monkeypatch: pytest.MonkeyPatch, options: dict, tied: bool
):
    """So the rows that are complete first are not those of the first batch. No model reads more rows than asked."""
    groups: list[list[int]] = []
    models, read = build_pair(), []
    for model in models:
        model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    if "compiled" in options:  # without the seconds that compiling takes
        monkeypatch.setattr(Reader, "_compile", lambda reader, plan: lambda: bool(reader._run(plan)) or True)
        options = {"compiled": CompiledDecoding(models[0], options["compiled"])}
    completions = sample(*models, batch_size=4, on_batch=lambda rows, _: groups.append(rows), **options)
    assert max(read) == 4
    order = sorted(range(12), key=lambda row: -len(PROMPTS[row]))
    assert len({len(completions[row]) for row in order[:4]}) > 1
    assert sorted(row for rows in groups for row in rows) == list(range(12))
    assert [len(rows) for rows in groups] == [4, 4, 4]
    assert (groups == [order[:4], order[4:8], order[8:]]) is tied


def test_without_a_share_of_the_teacher_nothing_asks_for_one():
    """Also not for what speculative mixing needs, such as random numbers."""
    student, teacher = build_pair()
    for keys in (None, KEYS):
        expected = sample(student, None, keys=keys)
        assert sample(student, None, keys=keys, mixing="speculative", alpha=0.0) == expected
    teacher.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher has run"))
    assert sample(student, teacher, mixing="speculative", alpha=0.0) == expected


def test_unknown_way_of_mixing_is_refused():
    with pytest.raises(UserError, match="mixing must be 'coins' or 'speculative', got 'coin'"):
        sample(*build_pair(), mixing="coin", alpha=0.5)


def test_drafts_without_a_share_of_the_teacher_are_refused():
    with pytest.raises(UserError, match=r"mixing='speculative' does not use drafts .* and alpha > 0"):
        sample(*build_pair(), mixing="speculative", alpha=0.0, drafts=EngineDrafts(lambda *_: []))


def test_rows_that_cross_the_limit_of_longrope_are_refused():
    """Of either model, by the longest prompt."""
    for name in ("student", "teacher"):
        models = dict(zip(("student", "teacher"), build_pair("llama"), strict=True))
        rope = models[name].config.rope_parameters
        models[name].config.rope_parameters = {**rope, "rope_type": "longrope", "original_max_position_embeddings": 16}
        assert len(sample(**models, max_new_tokens=5, alpha=0.5)) == 12
        with pytest.raises(UserError, match=r"A prompt of 11 tokens and max_new_tokens=6 cross .*=16 of Llama"):
            sample(**models, max_new_tokens=6, alpha=0.5)


def rows_of(*, coins: bool, greedy: bool = False, models=None, **options) -> Completions:
    """Sample the prompts with `sample_completions`, each row with coins of its own."""
    student, teacher = models or build_pair()
    ids, mask = left_pad(PROMPTS, PAD)
    numbers = np.stack([keyed_uniforms(8, *key) for key in KEYS])
    sampled = sample_completions(
        student,
        ids,
        mask,
        max_new_tokens=8,
        eos_token_ids=[0, 3],
        pad_token_id=PAD,
        uniforms=None if greedy else torch.from_numpy(numbers),
        teacher=teacher if coins else None,
        teacher_coins=np.stack([toss_coins(8, 0.5, *key) for key in KEYS]) if coins else None,
        **options,
    )
    assert (sampled.ids[~sampled.mask] == PAD).all()
    return sampled


def test_numbers_and_coins_belong_to_their_rows():
    """Rows are returned in the order that they had, whatever the order in which they end."""
    student, teacher = build_pair()
    ids, mask, *_ = rows_of(coins=True)
    for row, (prompt, key) in enumerate(zip(PROMPTS, KEYS, strict=True)):
        alone = sample_completions(
            student,
            torch.tensor([prompt]),
            torch.ones(1, len(prompt)),
            max_new_tokens=8,
            eos_token_ids=[0, 3],
            pad_token_id=PAD,
            uniforms=torch.from_numpy(keyed_uniforms(8, *key))[None],
            teacher=teacher,
            teacher_coins=toss_coins(8, 0.5, *key)[None],
        )
        assert ids[row, mask[row]].tolist() == alone.ids[0].tolist()
    expected = sample(student, None, max_new_tokens=8)
    ids, mask, *_ = rows_of(coins=False)
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == expected
    expected = sample(student, None, max_new_tokens=8, keys=None)
    ids, mask, *_ = rows_of(coins=False, greedy=True)
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == expected


def test_rows_without_real_tokens_have_finished_from_the_start():
    student, _ = build_pair()
    options = {"max_new_tokens": 4, "eos_token_ids": [], "pad_token_id": PAD, "uniforms": None}
    ids, mask = torch.tensor([[PAD, 6], [5, 6], [PAD, PAD]]), torch.tensor([[0, 1], [1, 1], [0, 0]])
    sampled = sample_completions(student, ids, mask, **options, keep_states=True)
    assert sampled.mask.tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert sampled.ids[2].tolist() == [PAD] * 4
    student.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the student has run"))
    for width, keep_states in ((1, False), (2, False), (2, True)):
        nothing = torch.full((2, width), PAD)
        sampled = sample_completions(student, nothing, 0 * nothing, **options, keep_states=keep_states)
        assert sampled.ids.shape == sampled.mask.shape == (2, 0)
        assert not keep_states or sampled.student_hidden_states.shape == (2, 0, 16)


def test_process_that_has_finished_goes_on_until_the_others_have():
    """Here they need three steps more."""
    expected = rows_of(coins=False)
    steps = int(expected.mask.sum(dim=1).max())
    others, own = iter([False] * 3), []

    def on_every_process(flag: bool) -> bool:
        own.append(flag)
        return flag and next(others, True)

    found = rows_of(coins=False, on_every_process=on_every_process)
    assert torch.equal(found.ids, expected.ids)
    assert own == [False] * steps + [True] * 4


@pytest.mark.parametrize("keep_states", [False, True])
def test_process_that_has_finished_makes_the_calls_of_the_others(keep_states: bool):
    """They need a model, or have not finished, the first 40 times that this process does not need it, or has."""
    expected = rows_of(coins=True, keep_states=keep_states)
    models, asked, answers = build_pair(), count(), []
    passes = [0, 0]
    for number, model in enumerate(models):

        def note(*_, number: int = number) -> None:
            passes[number] += 1

        model.base_model.register_forward_pre_hook(note)

    def on_every_process(flag: bool) -> bool:
        answers.append(flag and next(asked) >= 40)
        return answers[-1]

    found = rows_of(coins=True, keep_states=keep_states, models=models, on_every_process=on_every_process)
    # at each step, whether all have finished, and whether none needs the student, and the teacher; states, at the end
    assert passes == [answers[place::3].count(False) + keep_states for place in (1, 2)]
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.mask, expected.mask)
    for states, own in zip(expected[2:], found[2:], strict=True):
        if keep_states:
            torch.testing.assert_close(own[found.mask], states[found.mask], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 3, None])
def test_states_of_rows_that_leave_before_both_models_have_read_them(slots: int | None):
    student, teacher = build_pair("llama")
    batches: list[tuple[list[int], Completions]] = []
    options = {"alpha": 0.2, "shared_coins": False, "keep_states": True, "batch_size": slots}
    completions = sample(student, teacher, **options, on_batch=lambda *batch: batches.append(batch))
    assert completions == sample(student, teacher, **options | {"keep_states": False})
    check_kept_states((student, teacher), PROMPTS, completions, batches)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_with_unigrams_blocked_no_token_comes_twice(alpha: float):
    options = {"alpha": alpha, "shared_coins": False, "batch_size": 3, "no_repeat_ngram_size": 1}
    completions = sample(*build_pair(), **options)
    assert len({len(completion) for completion in completions}) > 2
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert len({*prompt, *completion}) == len({*prompt}) + len(completion)
