"""The law of `generate` with `TeacherMixedLogitsProcessor`, called as its docstring calls it, and what is refused."""

import pytest
import torch
from conftest import build_model
from test_sampling import EOS, HORIZON, PROMPTS, VOCAB, distance, mixture_law, tiny
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from minillm_trl import TeacherMixedLogitsProcessor
from minillm_trl.rollouts.keyed_random import keyed_uniforms

PROMPT = PROMPTS[1]
IDS, MASK = torch.tensor([[1, 1, *PROMPT]] * 8), torch.tensor([[0, 0, *[1] * len(PROMPT)]] * 8)


def generate(student: PreTrainedModel, processor: LogitsProcessor, **options) -> list[tuple[int, ...]]:
    """The completions, cut behind the first end-of-sequence token."""
    output = student.generate(
        input_ids=IDS,
        attention_mask=MASK,
        do_sample=True,
        max_new_tokens=HORIZON,
        eos_token_id=EOS,
        pad_token_id=1,
        logits_processor=[processor],
        **options,
    )
    rows = output[:, IDS.shape[1] :].tolist()
    return [tuple(row[: row.index(EOS) + 1] if EOS in row else row) for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_completions_follow_the_mixture_over_many_calls(temperature: float):
    """A processor for each call, and no seed: rows of one call share their coins, calls do not."""
    student, teacher, alpha, calls = tiny(0), tiny(1), 0.5, 300
    counts: dict[tuple, float] = {}
    torch.manual_seed(0)
    for _ in range(calls):
        processor = TeacherMixedLogitsProcessor(teacher, alpha, MASK)
        for completion in generate(student, processor, top_k=0, temperature=temperature):
            counts[completion] = counts.get(completion, 0.0) + 1 / (calls * len(IDS))
    assert distance(counts, mixture_law(student, teacher, PROMPT, alpha, temperature)) < 0.06
    assert distance(counts, mixture_law(student, teacher, PROMPT, alpha, 3.0 - temperature)) > 0.08
    assert distance(counts, mixture_law(student, teacher, PROMPT, 0.0, temperature)) > 0.08


@torch.no_grad()
def test_every_token_of_the_vocabulary_has_its_probability_in_the_mixture():
    """Of 120 tokens, 50 are what `generate` keeps unless it is told otherwise."""
    vocab, rows, calls, alpha = 120, 64, 200, 0.4
    models = [build_model("llama", vocab_size=vocab, seed=seed, width=16, layers=1) for seed in (0, 1)]
    ids = torch.tensor([[5, 6, 7]] * rows)
    student, teacher = (torch.softmax(model(ids[:1]).logits[0, -1].double(), dim=-1) for model in models)
    expected = alpha * teacher + (1 - alpha) * student
    counts = torch.zeros(vocab, dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(calls):
        processor = TeacherMixedLogitsProcessor(models[1], alpha, torch.ones_like(ids))
        output = models[0].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=1,
            pad_token_id=1,
            logits_processor=[processor],
        )
        counts += torch.bincount(output[:, -1], minlength=vocab)
    assert (counts > 0).all()
    frequencies = counts / counts.sum()
    # four deviations: of the draws, and of the coin that the rows of a call share
    deviation = (expected / (calls * rows) + alpha * (1 - alpha) * (teacher - student).square() / calls).sqrt()
    assert ((frequencies - expected).abs() < 4 * deviation).all()
    for other in (student, teacher):
        assert ((frequencies - other).abs() > 4 * deviation).any()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "TopKLogitsWarper"),
        ({"top_k": 0, "top_p": 0.9}, "TopPLogitsWarper"),
        ({"top_k": 0, "min_p": 0.1}, "MinPLogitsWarper"),
        ({"top_k": 0, "typical_p": 0.9}, "TypicalLogitsWarper"),
        ({"top_k": 0, "repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"top_k": 0, "no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"top_k": 0, "min_new_tokens": 2}, "MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor"),
    ],
)
def test_call_that_reshapes_the_scores_is_refused_with_its_name(options: dict, name: str):
    with pytest.raises(ValueError, match=f"{name}, .* top_k=0"):
        generate(tiny(0), TeacherMixedLogitsProcessor(tiny(1), 0.5, MASK), **options)


def test_generation_config_of_the_student_is_refused_too():
    student = tiny(0)
    student.generation_config = GenerationConfig(top_p=0.8)
    with pytest.raises(ValueError, match="TopKLogitsWarper, TopPLogitsWarper"):
        generate(student, TeacherMixedLogitsProcessor(tiny(1), 0.5, MASK))


def test_processors_of_the_user_and_loops_of_the_user_are_left_alone():
    class Recorder(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(scores)
            return scores

    seen = []
    student = tiny(0)
    processors = [TeacherMixedLogitsProcessor(tiny(1), 0.5, MASK), Recorder()]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "pad_token_id": 1, "eos_token_id": None}
    student.generate(input_ids=IDS, attention_mask=MASK, logits_processor=processors, **options)
    assert len(seen) == 2
    TeacherMixedLogitsProcessor(tiny(1), 0.5, MASK)(IDS, seen[0])


def test_coins_are_those_of_the_seed_or_else_of_the_generator_of_torch():
    student, teacher, scores = tiny(0), tiny(1), torch.zeros(8, VOCAB)
    generated = torch.cat([IDS, torch.ones(8, 40, dtype=torch.long)], dim=1)

    def coins(seed: int | None) -> list[bool]:
        processor = TeacherMixedLogitsProcessor(teacher, 0.5, MASK, seed=seed)
        lengths = range(IDS.shape[1], generated.shape[1])
        return [bool((processor(generated[:, :length], scores) != 0).any()) for length in lengths]

    assert student.config.vocab_size == VOCAB
    assert coins(3) == coins(3) == [keyed_uniforms(1, 3, step)[0] < 0.5 for step in range(40)]
    assert coins(3) != coins(4)
    torch.manual_seed(0)
    first, second = coins(None), coins(None)
    assert first != second
    torch.manual_seed(0)
    assert coins(None) == first


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_of_the_teacher_are_those_of_a_plain_forward_pass_at_every_step(family: str):
    teacher, steps = tiny(1, family), 6
    tokens = torch.randint(VOCAB, (8, steps), generator=torch.Generator().manual_seed(0))
    processor = TeacherMixedLogitsProcessor(teacher, 1.0, MASK)
    for step in range(steps):
        found = processor(torch.cat([IDS, tokens[:, :step]], dim=1), torch.zeros(8, VOCAB, dtype=torch.float64))
        for row in range(8):
            expected = teacher(torch.tensor([[*PROMPT, *tokens[row, :step]]])).logits[0, -1]
            torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("more", [-1, 0, 2], ids=["teacher has more", "same", "student has more"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_tokens_that_one_model_lacks_are_never_sampled(more: int, alpha: float):
    scores = torch.arange(8.0 * (VOCAB + more)).view(8, VOCAB + more)
    given, shared = scores.clone(), min(VOCAB, VOCAB + more)
    found = TeacherMixedLogitsProcessor(tiny(1), alpha, MASK)(IDS, scores)
    assert torch.equal(scores, given)  # which other processors and the caller may keep
    assert found.shape == scores.shape
    assert not found.requires_grad  # a loop of the user may compute gradients
    assert found[:, shared:].eq(-torch.inf).all()
    with torch.no_grad():
        of_teacher = tiny(1)(torch.tensor([PROMPT])).logits[:, -1].to(scores)
    expected = of_teacher.expand(8, -1) if alpha else given
    torch.testing.assert_close(found[:, :shared], expected[:, :shared])


@pytest.mark.parametrize("rows", [2, 5])
def test_second_call_of_generate_is_refused(rows: int):
    processor = TeacherMixedLogitsProcessor(tiny(1), 0.5, torch.ones(2, 2))
    processor(torch.ones(2, 2, dtype=torch.long), torch.zeros(2, VOCAB))
    with pytest.raises(ValueError, match="Make one TeacherMixedLogitsProcessor for each call"):
        processor(torch.ones(rows, 2, dtype=torch.long), torch.zeros(rows, VOCAB))


@pytest.mark.parametrize("shape", [(1, 2), (4, 2), (2, 1), (2, 3)])
def test_first_call_with_rows_of_another_mask_is_refused(shape: tuple[int, int]):
    """As beams and several sequences of a prompt make more rows."""
    processor = TeacherMixedLogitsProcessor(tiny(1), 0.5, torch.ones(2, 2))
    with pytest.raises(ValueError, match="without beams or num_return_sequences"):
        processor(torch.ones(shape, dtype=torch.long), torch.zeros(shape[0], VOCAB))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_share_outside_the_unit_interval_is_refused(alpha: float):
    with pytest.raises(ValueError, match=rf"alpha must lie in \[0, 1\], got {alpha}"):
        TeacherMixedLogitsProcessor(tiny(1), alpha, MASK)
