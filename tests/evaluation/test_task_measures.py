"""Samples and scores of the prompts of one dataset, against plain loops over full logits in float64."""

import copy
import math

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from minillm_trl.evaluation import task_measures
from minillm_trl.evaluation.exposure_bias import sample_divergences
from minillm_trl.evaluation.metrics import exact_match, repeated_ngrams, rouge_l
from minillm_trl.evaluation.task_measures import SharedMeasures, TaskMeasures, gather_rows, own_rows
from minillm_trl.models.context import max_context
from minillm_trl.models.encoding import encode_pair
from minillm_trl.rollouts.prompts import generate_completions

TOKENIZER = build_tokenizer()
ROWS = len(TOKENIZER)
PROMPTS = ["the mill is", "a", "the punter serves italian food", "near the river and", "pub"]
REFERENCES = [["a cheap pub", "the river"], ["the"], [" the city centre\n", "x"], [""], ["family", "the pub", "a"]]
DECODING = {"max_new_tokens": 7, "temperature": 0.6, "batch_size": 2}
DECODING |= {"eos_tokens": None, "chat_template_kwargs": None}
TEACHER_TEMPERATURE = 1.4
ENDS = list(range(60))


class Bar:
    """Stands in for the progress bar."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, number: int) -> None:
        self.n += number


@pytest.fixture(scope="module")
def models():
    """A student and a teacher whose vocabularies are padded; both end a text early now and then."""
    found = build_model("gpt2", ROWS + 20), build_model("llama", ROWS + 9, seed=1)
    for model in found:
        model.generation_config.eos_token_id = ENDS
    return found


def task_of(student, teacher=None, prompts=PROMPTS, references=REFERENCES, shared=None, **options) -> TaskMeasures:
    columns = {"prompt": prompts} | ({} if references is None else {"references": references})
    decoding = {**DECODING, **options}
    return TaskMeasures(
        student, teacher, TOKENIZER, Dataset.from_dict(columns), decoding, TEACHER_TEMPERATURE, 3, shared
    )


def full_log_probs(model, prompt: list[int], completion: list[int], temperature: float = 1.0, rows: int = ROWS):
    """`(T, rows)`, from the logits of one sequence without padding."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([prompt + completion])).logits[0, :, :rows]
    return torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> list[float]:
    return (log_p.exp() * (log_p - log_q)).sum(-1).tolist()


def sampled(model, temperature: float, prompts=PROMPTS, **options):
    """Completions of the prompts with their prompts' tokens."""
    completions = generate_completions(
        model, TOKENIZER, prompts, no_repeat_ngram_size=3, **{**DECODING, "temperature": temperature, **options}
    )
    return list(zip(TOKENIZER(prompts)["input_ids"], completions, strict=True))


def text_scores(row: int, completion) -> dict[str, float]:
    return {
        "length": len(completion.token_ids),
        "eos_rate": float(completion.token_ids[-1] in ENDS),
        "repeated_4grams": repeated_ngrams(completion.token_ids, 4),
        "rouge_l": rouge_l(completion.text, REFERENCES[row]),
        "exact_match": exact_match(completion.text, REFERENCES[row]),
    }


def test_samples_have_the_scores_of_their_text_and_of_both_distributions(models):
    student, teacher = models
    bar = Bar()
    found = task_of(student, teacher).measure_samples(5, bar)
    alone = task_of(student, references=None).measure_samples(5, Bar())
    assert bar.n == len(found) == len(alone) == len(PROMPTS)
    for row, (prompt, completion) in enumerate(sampled(student, 0.6, seed=5)):
        log_q = full_log_probs(student, prompt, completion.token_ids, 0.6)
        log_p = full_log_probs(teacher, prompt, completion.token_ids, TEACHER_TEMPERATURE)
        divergence, entropy, length = kl(log_q, log_p), -(log_q.exp() * log_q).sum(-1), len(completion.token_ids)
        expected = {
            **text_scores(row, completion),
            "entropy_per_token": entropy.mean().item(),
            "reverse_kl": sum(divergence),
            "reverse_kl_per_token": sum(divergence) / length,
        }
        assert found[row] == {"output": completion.text, "scores": pytest.approx(expected, rel=1e-4)}
        fewer = {name: expected[name] for name in ("length", "eos_rate", "repeated_4grams", "entropy_per_token")}
        assert alone[row] == {"output": completion.text, "scores": pytest.approx(fewer, rel=1e-4)}
    assert {row["scores"]["eos_rate"] for row in found} == {0.0, 1.0}


def test_model_with_fewer_rows_than_the_tokenizer_has_the_entropy_of_its_rows():
    model = build_model("gpt2", ROWS - 5)
    model.generation_config.eos_token_id = ENDS
    prompts = ["the mill is", "a", "pub"]
    found = task_of(model, prompts=prompts, references=None).measure_samples(5, Bar())
    for row, (prompt, completion) in zip(found, sampled(model, 0.6, prompts, seed=5), strict=True):
        log_q = full_log_probs(model, prompt, completion.token_ids, 0.6)
        assert row["scores"]["entropy_per_token"] == pytest.approx(-(log_q.exp() * log_q).sum(-1).mean().item())


def test_greedy_decoding_has_the_divergence_of_a_point_mass(models):
    student, teacher = models
    found = task_of(student, teacher).measure_samples(None, Bar())
    alone = task_of(student).measure_samples(None, Bar())
    for row, (prompt, completion) in enumerate(sampled(student, 0.6, greedy=True)):
        log_p = full_log_probs(teacher, prompt, completion.token_ids, TEACHER_TEMPERATURE)
        loss = -sum(log_p[t, token].item() for t, token in enumerate(completion.token_ids))
        expected = text_scores(row, completion)
        assert alone[row] == {"output": completion.text, "scores": expected}
        expected |= {"entropy_per_token": 0.0, "reverse_kl": loss, "reverse_kl_per_token": loss / len(log_p)}
        assert found[row] == {"output": completion.text, "scores": pytest.approx(expected, rel=1e-4)}


def test_forward_kl_is_on_the_teacher_s_samples_which_evaluations_share(models):
    student, teacher = models
    shared, bar = SharedMeasures(), Bar()
    for temperature in (0.6, 0.9):  # of the student
        for seed in (5, 6):
            found = task_of(student, shared=shared, temperature=temperature).measure_forward_kl(teacher, seed, bar)
            for row, (prompt, completion) in zip(found, sampled(teacher, TEACHER_TEMPERATURE, seed=seed), strict=True):
                log_p = full_log_probs(teacher, prompt, completion.token_ids, TEACHER_TEMPERATURE)
                divergence = kl(log_p, full_log_probs(student, prompt, completion.token_ids, temperature))
                expected = {"forward_kl": sum(divergence), "forward_kl_per_token": sum(divergence) / len(divergence)}
                assert row == pytest.approx(expected, rel=1e-4)
    assert bar.n == 2 * len(PROMPTS)  # once for each seed
    assert shared.teacher_samples.keys() == {(5, TEACHER_TEMPERATURE), (6, TEACHER_TEMPERATURE)}


def test_blocked_ngrams_do_not_repeat_and_others_are_counted(models):
    options = {"max_new_tokens": 30, "eos_tokens": ["<eos>"]}
    task = task_of(models[0], **options)
    assert [row["scores"]["repeated_4grams"] for row in task.measure_samples(None, Bar())] == [0.0] * len(PROMPTS)
    task.no_repeat_ngram_size = 0
    completions = generate_completions(models[0], TOKENIZER, PROMPTS, greedy=True, **options)
    shares = [repeated_ngrams(completion.token_ids, 4) for completion in completions]
    assert [row["scores"]["repeated_4grams"] for row in task.measure_samples(None, Bar())] == shares
    assert max(shares) > max(repeated_ngrams(completion.token_ids, 5) for completion in completions)


def all_measures(student, teacher) -> list:
    """Each measure of a new task, losses first."""
    task = task_of(student, teacher)
    found = [[{"loss": loss} for loss in task.measure_losses()]]
    for seed in (5, None):
        found.append([row["scores"] for row in task.measure_samples(seed, Bar())])
    found.append(task.measure_forward_kl(teacher, 5, Bar()))
    return found


def test_models_are_measured_in_eval_mode():
    """GPT-2 has dropout."""
    student, teacher = (build_model("gpt2", ROWS, seed) for seed in (0, 1))
    expected = all_measures(student, teacher)
    student.train()
    for row, measures in zip(all_measures(student, teacher)[0], expected[0], strict=True):
        assert row == pytest.approx(measures, rel=1e-4)
    teacher.train()  # no other measure has put it in eval mode
    for row, measures in zip(task_of(student, teacher).measure_samples(None, Bar()), expected[2], strict=True):
        assert row["scores"] == pytest.approx(measures, rel=1e-4)
    teacher.train()
    for row, measures in zip(all_measures(student, teacher)[1], expected[1], strict=True):
        assert row == pytest.approx(measures, rel=1e-4)
    task = task_of(student)
    for _ in range(2):  # the second time with the teacher's samples of the first
        student.train()
        for row, measures in zip(task.measure_forward_kl(teacher, 5, Bar()), expected[3], strict=True):
            assert row == pytest.approx(measures, rel=1e-4)
        teacher.train()


def test_forward_pass_has_at_most_the_rows_of_a_batch():
    student, teacher = (build_model("gpt2", ROWS, seed) for seed in (0, 1))
    rows: list[int] = []
    for model in (student, teacher):
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    all_measures(student, teacher)
    task_of(student, teacher).measure_errors(teacher, 2, 5, False)
    assert max(rows) == DECODING["batch_size"]


def slow_loss(model, prompt: str, references: list[str], limit: int) -> float:
    losses = []
    for reference in references:
        context, learnt = encode_pair(TOKENIZER, prompt, reference)
        learnt = learnt[: limit - len(context)]
        log_q = full_log_probs(model, context, learnt, rows=model.config.vocab_size)
        losses += [-log_q[t, token].item() for t, token in enumerate(learnt)]
    return sum(losses) / len(losses)


def test_loss_is_the_mean_over_the_tokens_of_all_references_within_the_context():
    model = build_model("gpt2", ROWS + 20, positions=24)
    references = [*REFERENCES[:-1], ["the mill " * 20, "a"]]
    prompts = [*PROMPTS[:-1], "the river and the city and the food"]
    shared = SharedMeasures()
    found = task_of(model, prompts=prompts, references=references, shared=shared).measure_losses()
    expected = [slow_loss(model, *pair, 24) for pair in zip(prompts, references, strict=True)]
    assert found == pytest.approx(expected, rel=1e-4)
    other = build_model("gpt2", ROWS, seed=3)
    assert task_of(other, shared=shared).measure_losses() is found
    assert task_of(other).measure_losses() != found


def test_model_without_a_limit_sees_whole_references():
    model = build_model("bloom", ROWS)
    del model.config.max_position_embeddings  # Bloom's own configuration states no limit
    assert max_context(model) is None
    references = [["the mill " * 40]]
    expected = slow_loss(model, PROMPTS[0], references[0], 10**6)
    assert task_of(model, prompts=PROMPTS[:1], references=references).measure_losses() == pytest.approx([expected])


def test_references_of_conversations_follow_the_chat_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if thinks %}!{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    prompt = [{"role": "user", "content": "the mill"}]
    rows = Dataset.from_dict({"prompt": [prompt], "references": [["a pub"]]})
    decoding = {**DECODING, "chat_template_kwargs": {"thinks": True}}
    task = TaskMeasures(build_model("gpt2", ROWS), None, tokenizer, rows, decoding, 1.0, 0)
    ((context, learnt),) = task.pairs[0]
    text = "!user: the mill\nassistant: a pub\n"
    assert tokenizer.decode(context + learnt) == text
    assert tokenizer.decode(task.prompt_ids[0]) == "!user: the mill\nassistant: "
    assert text.startswith(tokenizer.decode(context))
    assert len(context) >= len(task.prompt_ids[0]) - 1  # a token may span the border


def test_length_of_a_reference_is_that_of_the_first_without_white_space_or_ends(models):
    expected = [len(TOKENIZER(text)["input_ids"]) for text in ("a cheap pub", "the", "the city centre", "", "family")]
    task = task_of(models[0])
    assert task.reference_lengths() == expected
    task.tokenizer = build_tokenizer()
    adds_end = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", TOKENIZER.eos_token_id)])
    task.tokenizer.backend_tokenizer.post_processor = adds_end
    assert task.reference_lengths() == expected
    assert task_of(models[0], references=None).reference_lengths() == []


@pytest.mark.parametrize(
    ("prompts", "references"), [(["a", "near the river"], None), (["a", "a"], [["the"], ["near the river"]])]
)
def test_token_that_the_model_does_not_embed_is_refused_before_sampling(prompts, references):
    model = build_model("gpt2", max(TOKENIZER("near the river")["input_ids"]))
    with pytest.raises(ValueError, match="embeddings only"):
        task_of(model, prompts=prompts, references=references)


def test_teacher_without_rows_for_all_tokens_is_named():
    student, teacher = build_model("gpt2", ROWS), build_model("gpt2", ROWS - 1)
    task = task_of(student, teacher, PROMPTS[:1], references=None, max_new_tokens=1)
    for measure in (
        lambda: task.measure_samples(5, Bar()),
        lambda: task.measure_samples(None, Bar()),
        lambda: task.measure_forward_kl(teacher, 5, Bar()),
    ):
        with pytest.raises(ValueError, match=f"the teacher's LM head has {ROWS - 1} rows"):
            measure()


def test_prompt_that_fills_the_context_is_refused_before_sampling():
    prompt = TOKENIZER.decode([66] * 8)
    ids = TOKENIZER(prompt)["input_ids"]
    with pytest.raises(ValueError, match=f"Prompt 1 has {len(ids)} tokens, .* context of {len(ids)}"):
        task_of(build_model("llama", ROWS, positions=len(ids)), prompts=["a", prompt], references=None)
    room_for_one = build_model("llama", ROWS, positions=len(ids) + 1)
    references = [["the mill is a cheap pub"]]
    found = task_of(room_for_one, prompts=[prompt], references=references).measure_losses()
    assert found == pytest.approx([slow_loss(room_for_one, prompt, references[0], len(ids) + 1)])


def test_prompt_without_a_reference_is_refused_before_sampling(models):
    with pytest.raises(ValueError, match="Prompt 1 has no reference"):
        task_of(models[0], prompts=["a", "pub"], references=[["the"], []])


class Process:
    """Stands in for `PartialState` and for `gather_object`: all processes run one after the other, twice.

    In the first round the parts of later processes are not known.
    """

    def __init__(self, count: int):
        self.process_index, self.num_processes = 0, count
        self.parts: dict[tuple[int, int], list] = {}
        self.calls = 0

    def gather(self, values: list) -> list:
        (part,) = values
        self.parts[self.process_index, self.calls] = part
        rows = [range(process, len(PROMPTS), self.num_processes) for process in range(self.num_processes)]
        found = [self.parts.get((process, self.calls), [()] * len(rows[process])) for process in range(len(rows))]
        self.calls += 1
        return found


@pytest.mark.parametrize("count", [2, 7])
def test_processes_share_the_prompts_and_all_get_all_results(models, monkeypatch, count: int):
    student, teacher = models
    bars = [Bar() for _ in range(count)]

    def measure(bar: Bar) -> list:
        task = task_of(student, teacher)
        return [
            task.measure_samples(5, bar),
            task.measure_forward_kl(teacher, 5, Bar()),
            task.measure_losses(),
            task.measure_errors(teacher, 2, 5, False),
        ]

    (expected_samples, *expected) = measure(Bar())
    process = Process(count)
    monkeypatch.setattr(task_measures, "PartialState", lambda: process)
    monkeypatch.setattr(task_measures, "gather_object", process.gather)
    for first_round in (True, False):
        for process.process_index in range(count):
            process.calls = 0
            bar = bars[process.process_index] = Bar()
            samples, *others = measure(bar)
            assert bar.n == count * len(own_rows(len(PROMPTS)))
            if not first_round:
                assert [row["output"] for row in samples] == [row["output"] for row in expected_samples]
                for row, other in zip(samples, expected_samples, strict=True):
                    assert row["scores"] == pytest.approx(other["scores"], rel=1e-4)
                for rows, other in zip(others[0], expected[0], strict=True):
                    assert rows == pytest.approx(other, rel=1e-4)
                assert others[1] == pytest.approx(expected[1], rel=1e-4)
                for errors, of_all in zip(others[2], expected[2], strict=True):
                    assert [pytest.approx(values, rel=1e-3, abs=1e-6) for values in of_all] == errors


def test_each_process_has_every_nth_row(monkeypatch):
    process = Process(3)
    monkeypatch.setattr(task_measures, "PartialState", lambda: process)
    process.process_index = 2
    assert list(own_rows(8)) == [2, 5]
    monkeypatch.setattr(task_measures, "gather_object", lambda values: [["a", "d"], ["b", "e"], *values])
    assert gather_rows(["c"], 5) == ["a", "b", "c", "d", "e"]


def test_errors_are_those_of_samples_of_both_models(models):
    student, teacher = models
    options = {**DECODING, "samples": 2, "seed": 5}
    assert task_of(student, teacher).measure_errors(teacher, 2, 5, False) == list(
        sample_divergences(student, teacher, TOKENIZER, PROMPTS, **options)
    )
    assert all(math.isfinite(value) for value in task_of(student).measure_losses())
