"""Excess accumulated error: cases worked out by hand, and plain loops that sample and score on their own."""

import copy
import random

import numpy as np
import pytest
import torch
from chat_models import TEXT_END, build_chat_tokenizer
from conftest import build_model, build_tokenizer

from minillm_trl.evaluation import exposure_bias
from minillm_trl.evaluation.exposure_bias import ExposureBias, excess_accumulated_error, sample_divergences
from minillm_trl.rollouts.keyed_random import evaluation_key, keyed_uniforms

TOKENIZER = build_tokenizer()
PROMPTS = ["the mill", "the punter serves", "a cheap pub near the river", "food\n"]
ENDS = list(range(60))

# (on the student's samples, on the teacher's samples, result)
CASES = [
    # one sample each: cumulative sums 1, 3, 6 and 1/2, 1, 4; (1 - 1/2) / (1/2), (3 - 1) / 1, (6 - 4) / 4
    ([[1, 2, 3]], [[0.5, 0.5, 3]], ExposureBias([1, 3, 6], [0.5, 1, 4], [100, 200, 50], [1] * 3, [1] * 3)),
    # an ended sample leaves the mean: 1, then (2 + 4) / 2, then 6 of the one that goes on
    (
        [[1, 2], [1, 4, 6], [1]],
        [[1, 2, 2]],
        ExposureBias([1, 4, 10], [1, 3, 5], [0, 100 / 3, 100], [3, 2, 1], [1] * 3),
    ),
    # up to the last position that both reach
    ([[1, 1, 1, 1]], [[2], [2, 2]], ExposureBias([1, 2], [2, 4], [-50, -50], [1, 1], [2, 1])),
    ([[1]], [[2, 2, 2]], ExposureBias([1], [2], [-50], [1], [1])),
    # no error of the teacher's contexts to be in excess of, then some
    ([[0, 1]], [[0, 2]], ExposureBias([0, 1], [0, 2], [None, -50], [1, 1], [1, 1])),
    # an empty sample has no position
    ([[], [3]], [[2]], ExposureBias([3], [2], [50], [1], [1])),
]


@pytest.mark.parametrize(("on_student", "on_teacher", "expected"), CASES)
def test_hand_computed_cases(on_student, on_teacher, expected):
    actual = excess_accumulated_error(on_student, on_teacher)
    assert actual.counts_student == expected.counts_student
    assert actual.counts_teacher == expected.counts_teacher
    assert actual.student == pytest.approx(expected.student)
    assert actual.teacher == pytest.approx(expected.teacher)
    assert actual.excess_error == pytest.approx(expected.excess_error)


@pytest.mark.parametrize(("on_student", "on_teacher"), [([], [[1.0]]), ([[1.0]], []), ([[], []], [[1.0]])])
def test_samples_without_tokens_are_refused(on_student, on_teacher):
    with pytest.raises(ValueError, match="at least one token each"):
        excess_accumulated_error(on_student, on_teacher)


def test_excess_error_equals_the_definition_term_by_term():
    generator = random.Random(0)
    both = [[[generator.random() for _ in range(generator.randint(1, 9))] for _ in range(20)] for _ in range(2)]
    actual = excess_accumulated_error(*both)
    for l in range(1, len(actual.student) + 1):  # noqa: E741 -- the paper's name
        total = [sum(np.mean([eps[t] for eps in samples if t < len(eps)]) for t in range(l)) for samples in both]
        average = total[1] / l
        assert actual.excess_error[l - 1] == pytest.approx((total[0] - l * average) / (l * average) * 100)


def test_order_of_the_samples_does_not_matter():
    generator = random.Random(1)
    both = [[[generator.random() for _ in range(generator.randint(1, 9))] for _ in range(30)] for _ in range(2)]
    expected = excess_accumulated_error(*both)
    for samples in both:
        generator.shuffle(samples)
    assert excess_accumulated_error(*both) == expected


def slow_divergences(sampler, student, teacher, prompts, samples, max_new_tokens, seed, rows, ends=ENDS):
    """KL(teacher || student) along samples that are drawn a token at a time from full logits in float64."""
    sampler, student, teacher = (copy.deepcopy(model).double() for model in (sampler, student, teacher))

    def probabilities(model, ids):
        with torch.no_grad():
            return torch.softmax(model(torch.tensor([ids])).logits[0, -1, :rows], dim=-1).numpy()

    divergences = []
    for prompt in prompts:
        prompt_ids = TOKENIZER(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        for number in range(samples):
            ids, steps = list(prompt_ids), []
            for uniform in keyed_uniforms(max_new_tokens, *evaluation_key(seed, prompt_ids, number)):
                p, q = probabilities(teacher, ids), probabilities(student, ids)
                steps.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
                ids.append(int(np.searchsorted(np.cumsum(probabilities(sampler, ids)), uniform, side="right")))
                if ids[-1] in ends:
                    break
            divergences.append(steps)
    return divergences


def models(student_family="gpt2", teacher_family="llama"):
    """The vocabularies are padded; both models end a text early now and then."""
    found = build_model(student_family, len(TOKENIZER) + 5), build_model(teacher_family, len(TOKENIZER) + 12, seed=1)
    for model in found:
        model.generation_config.eos_token_id = ENDS
    return found


def measure(student, teacher, prompts=PROMPTS, **options):
    settings = {"samples": 3, "max_new_tokens": 6, "seed": 5, **options}
    return excess_accumulated_error(*sample_divergences(student, teacher, TOKENIZER, prompts, **settings))


def assert_alike(one, other):
    assert (one.counts_student, one.counts_teacher) == (other.counts_student, other.counts_teacher)
    for name in ("student", "teacher", "excess_error"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("families", [("gpt2", "llama"), ("qwen3", "opt")])
def test_measured_bias_equals_a_slow_one_that_samples_on_its_own(families):
    student, teacher = models(*families)
    expected = excess_accumulated_error(
        *(slow_divergences(model, student, teacher, PROMPTS, 3, 6, 5, len(TOKENIZER)) for model in (student, teacher))
    )
    actual = measure(student, teacher)
    assert_alike(actual, expected)
    assert actual.counts_student[0] == actual.counts_teacher[0] == 12
    assert min(actual.counts_student[-1], actual.counts_teacher[-1]) < 12  # some samples have ended


@pytest.mark.parametrize("batch_size", [1, 5])
def test_measured_bias_does_not_depend_on_batches_or_on_the_order_of_prompts(batch_size):
    assert_alike(measure(*models(), PROMPTS[::-1], batch_size=batch_size), measure(*models()))


def test_the_step_that_chooses_the_first_token_counts():
    """Its context is the prompt for both models, so its error is the same on the samples of both."""
    student, teacher = models()
    actual = measure(student, teacher)
    steps = slow_divergences(student, student, teacher, PROMPTS, 1, 1, 0, len(TOKENIZER))
    assert actual.student[0] == pytest.approx(np.mean(steps), rel=1e-4)
    assert actual.teacher[0] == pytest.approx(np.mean(steps), rel=1e-4)
    assert actual.excess_error[0] == pytest.approx(0.0, abs=1e-3)
    assert len(measure(student, teacher, max_new_tokens=1).student) == 1


def test_temperature_is_that_of_samples_and_errors():
    student, teacher = models()
    heated = [copy.deepcopy(model) for model in (student, teacher)]
    for model in heated:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight / 2)
    assert_alike(measure(student, teacher, temperature=2.0), measure(*heated))


def test_student_that_equals_its_teacher_has_no_error_and_no_excess():
    model = models()[0]
    actual = measure(model, copy.deepcopy(model))
    assert actual.student == actual.teacher == [0.0] * len(actual.student)
    assert actual.excess_error == [None] * len(actual.student)


def test_samples_end_with_the_given_tokens():
    student, teacher = models()
    expected = measure(student, teacher)
    for model in (student, teacher):
        model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    assert measure(student, teacher).counts_student != expected.counts_student
    assert_alike(measure(student, teacher, eos_tokens=TOKENIZER.convert_ids_to_tokens(ENDS)), expected)


def test_without_a_seed_no_two_measurements_share_their_samples():
    student, teacher = models()
    torch.manual_seed(0)
    first, second = (measure(student, teacher, seed=None).student for _ in range(2))
    torch.manual_seed(0)
    assert measure(student, teacher, seed=None).student == first != second


def test_models_are_put_in_eval_mode():
    student, teacher = models("gpt2", "gpt2")  # with dropout
    expected = measure(student, teacher)
    assert_alike(measure(student.train(), teacher.train()), expected)
    assert not student.training
    assert not teacher.training


def test_forward_pass_has_at_most_the_rows_of_a_batch():
    student, teacher = models()
    rows = []
    for model in (student, teacher):
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    measure(student, teacher, batch_size=5)  # of 12 samples
    assert max(rows) == 5
    rows.clear()
    measure(student, teacher, PROMPTS[:1], samples=70, max_new_tokens=1)
    assert max(rows) == 64


def test_tokenizer_without_a_padding_token_pads_with_its_end():
    student, teacher = models()
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    options = {"samples": 3, "max_new_tokens": 6, "seed": 5}
    found = sample_divergences(student, teacher, tokenizer, PROMPTS, **options)
    assert_alike(excess_accumulated_error(*found), measure(student, teacher))


@pytest.mark.parametrize(("kwargs", "count"), [(None, 3), ({"extra": "a pub "}, 2)])
def test_samples_of_conversations_follow_the_template_and_end_with_a_turn(kwargs, count):
    tokenizer = build_chat_tokenizer(eos=TEXT_END)
    tokenizer.chat_template = (
        "{{ extra }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}> {% endif %}"
    )
    student, teacher = (build_model("gpt2", len(tokenizer), seed, width=16, layers=1) for seed in (0, 1))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        for model in (student, teacher):  # likely to end
            hidden = model.transformer(torch.tensor([[end]])).last_hidden_state[0, -1]
            model.lm_head.weight[end] = 15 * hidden / hidden.dot(hidden)
    prompts = ["the mill", "a pub", "food near the river"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts[:count]]
    found = sample_divergences(
        student,
        teacher,
        tokenizer,
        [*chats, *prompts[count:]],
        samples=2,
        max_new_tokens=4,
        seed=5,
        chat_template_kwargs=kwargs,
    )
    texts = [f"{(kwargs or {}).get('extra', '')}{prompt}<|im_end|>> " for prompt in prompts[:count]]
    ids = tokenizer([*texts, *prompts[count:]], add_special_tokens=False)["input_ids"]
    for model, errors in zip((student, teacher), found, strict=True):
        expected = slow_divergences(model, student, teacher, ids, 2, 4, 5, len(tokenizer), (0, end))
        assert errors == [pytest.approx(values, rel=1e-3, abs=1e-5) for values in expected]
    assert min(map(len, found[0] + found[1])) < 4


class Bar:
    """Stands in for the progress bar."""

    def __init__(self, total: int, disable: bool, **_):
        self.total, self.disable, self.n = total, disable, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, number: int) -> None:
        self.n += number


@pytest.mark.parametrize("progress", [{}, {"progress": True}])
def test_progress_is_of_the_samples_of_both_models(monkeypatch, progress):
    bars = []
    monkeypatch.setattr(exposure_bias, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[0])
    measure(*models(), **progress)
    assert (bars[0].n, bars[0].total, bars[0].disable) == (24, 24, not progress)


def test_samples_of_a_prompt_differ():
    student, teacher = models()
    assert measure(student, teacher, PROMPTS[:1], samples=1).student != measure(student, teacher, PROMPTS[:1]).student


@pytest.mark.parametrize(
    ("prompts", "samples", "message"),
    [([], 3, "needs samples of student and teacher"), (PROMPTS, 0, "at least one sample of each prompt")],
)
def test_nothing_to_measure_is_refused(prompts, samples, message):
    with pytest.raises(ValueError, match=message):
        measure(*models(), prompts, samples=samples)


@pytest.mark.parametrize("small", ["student", "teacher"])
def test_model_without_rows_for_all_tokens_is_named(small):
    sizes = {"student": len(TOKENIZER), "teacher": len(TOKENIZER), small: len(TOKENIZER) - 1}
    with pytest.raises(ValueError, match=f"the {small}'s LM head has {len(TOKENIZER) - 1} rows"):
        measure(*(build_model("gpt2", size) for size in sizes.values()))
