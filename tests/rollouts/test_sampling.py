"""The law of sampled completions against enumeration, and what does not change it."""

import gc
import math
from itertools import product

import numpy as np
import pytest
import torch
from conftest import FAMILIES, build_model
from kept_states import check_kept_states
from transformers import GenerationConfig, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

import minillm_trl.rollouts.coins
import minillm_trl.rollouts.slots
from minillm_trl.models.lm_head import cache_argument
from minillm_trl.rollouts.buffer import deal_rows
from minillm_trl.rollouts.decoding import check_decoding
from minillm_trl.rollouts.keyed_random import ROLLOUT_ORDER, keyed_uniforms, toss_coins
from minillm_trl.rollouts.sampling import draw_tokens, left_pad, sample_completions, sample_prompts
from minillm_trl.rollouts.slots import Buffer

VOCAB, HORIZON, EOS = 3, 3, 0
PROMPTS = [[1], [2, 1, 2, 2]]


def tiny(seed: int, family: str = "gpt2") -> PreTrainedModel:
    model = build_model(family, vocab_size=VOCAB, seed=seed, width=8, layers=1).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    return model


@torch.no_grad()
def next_probs(model: PreTrainedModel, prompt: list[int], temperature: float) -> dict[tuple, torch.Tensor]:
    """Next-token probabilities `(V,)` after the prompt and every beginning of a completion.

    They come from plain forward passes without padding or a cache, one over all beginnings of the same length.
    """
    probs = {}
    for length in range(HORIZON):
        beginnings = list(product(range(VOCAB), repeat=length))
        logits = model(torch.tensor([[*prompt, *tokens] for tokens in beginnings]), use_cache=False).logits[:, -1]
        probs |= zip(beginnings, torch.softmax(logits / temperature, -1), strict=True)
    return probs


def mixture_law(student, teacher, prompt: list[int], alpha: float, temperature: float) -> dict[tuple, float]:
    """Probability of every completion under the per-token mixture."""
    of_student, of_teacher = (next_probs(model, prompt, temperature) for model in (student, teacher))
    law = {}
    for tokens in product(range(VOCAB), repeat=HORIZON):
        completion = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        if completion in law:
            continue
        probability = 1.0
        for t, token in enumerate(completion):
            mixed = alpha * of_teacher[completion[:t]] + (1 - alpha) * of_student[completion[:t]]
            probability *= mixed[token].item()
        law[completion] = probability
    return law


def distance(counts: dict[tuple, float], law: dict[tuple, float]) -> float:
    """Total variation distance."""
    return sum(abs(counts.get(key, 0.0) - value) for key, value in law.items()) / 2


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["padded by 4", "padded by 1"])
def test_given_the_coins_every_token_has_exactly_the_interval_of_its_model(family: str, prompt: list[int]):
    """With coins of probability alpha this is the mixture: P(token) = alpha p(token) + (1 - alpha) q(token)."""
    models = [tiny(0, family), tiny(1, family)]
    temperature, margin = 1.7, 1e-9
    probs = [next_probs(model, prompt, temperature) for model in models]
    completions = list(product(range(VOCAB), repeat=HORIZON))
    padding = 5 - len(prompt)
    for coins in product([False, True], repeat=HORIZON):
        low, high = torch.zeros(2, len(completions), HORIZON, dtype=torch.float64)
        for n, completion in enumerate(completions):
            for t, coin in enumerate(coins):
                bounds = probs[coin][completion[:t]].cumsum(0).tolist()
                low[n, t], high[n, t] = [0.0, *bounds][completion[t]], bounds[completion[t]]
        uniforms = torch.cat([low + margin, high - margin])
        sampled, mask, *_ = sample_completions(
            models[0],
            torch.tensor([[1] * padding + prompt]).expand(len(uniforms), -1),
            torch.tensor([[0] * padding + [1] * len(prompt)]).expand(len(uniforms), -1),
            max_new_tokens=HORIZON,
            eos_token_ids=[EOS],
            pad_token_id=1,
            uniforms=uniforms,
            temperature=temperature,
            teacher=models[1],
            teacher_coins=np.array([coins]),
        )
        expected = torch.tensor(completions * 2)
        assert torch.equal(sampled[mask], expected[mask])


@torch.no_grad()
@pytest.mark.parametrize("coin_key", [(99,), None], ids=["own key", "default coins"])
@pytest.mark.parametrize(
    ("family", "shared", "slots"),
    [("gpt2", True, None), ("gpt2", False, None), ("llama", False, None), ("gpt2", True, 3), ("llama", False, 3)],
)
def test_samples_follow_the_law_of_the_mixture(
    family: str, shared: bool, slots: int | None, coin_key: tuple[int] | None
):
    """With fewer slots than rows, batches follow one another; with coins of its own, a row enters when one ends."""
    student, teacher = tiny(0, family), tiny(1, family)
    alpha = 0.4
    calls, rows = (300, 8) if shared else (1, 2400)  # rows that share their coins are dependent, calls are not
    counts: dict[tuple, float] = {}
    for call in range(calls):
        completions = sample_prompts(
            student,
            [PROMPTS[0], *[PROMPTS[1]] * rows],  # the first one is padded
            keys=[(call, row) for row in range(rows + 1)],
            max_new_tokens=HORIZON,
            eos_token_ids=[EOS],
            pad_token_id=1,
            teacher=teacher,
            alpha=alpha,
            coin_key=coin_key and (*coin_key, call),
            shared_coins=shared,
            batch_size=slots if shared else slots and 200 * slots,
        )
        for completion in completions[1:]:
            counts[tuple(completion)] = counts.get(tuple(completion), 0.0) + 1 / (calls * rows)
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], alpha, 1.0)) < 0.05
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], 0.0, 1.0)) > 0.08
    assert distance(counts, mixture_law(student, teacher, PROMPTS[1], 1.0, 1.0)) > 0.08


def sample(prompts: list[list[int]], batch_size: int | None, family: str = "gpt2", alpha: float = 0.0, **options):
    model = build_model(family, vocab_size=50, width=16, layers=2)
    keys = [(7, sum(prompt)) for prompt in prompts]
    return sample_prompts(
        model,
        prompts,
        keys=keys,
        max_new_tokens=24,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=batch_size,
        alpha=alpha,
        teacher=build_model(family, vocab_size=50, seed=1, width=16, layers=2),
        **options,
    )


LONG_PROMPTS = [[5 + i, *range(6, 6 + (3 * i) % 11)] for i in range(12)]


@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "shared_coins": False}], ids=["student", "coins of its own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_does_not_depend_on_the_rows_beside_it(family: str, options: dict):
    alone = sample(LONG_PROMPTS, batch_size=1, family=family, **options)
    assert sample(LONG_PROMPTS, batch_size=5, family=family, **options) == alone
    assert sample(LONG_PROMPTS[::-1], batch_size=None, family=family, **options) == alone[::-1]
    assert len({len(completion) for completion in alone}) > 3  # rows finish at different steps


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_slots_take_the_next_prompt_as_soon_as_their_row_has_finished(alpha: float):
    model, teacher = (build_model("llama", vocab_size=50, seed=seed, width=16, layers=1) for seed in (0, 1))
    rows = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    groups = []
    completions = sample_prompts(
        model,
        LONG_PROMPTS,
        keys=[(7, sum(prompt)) for prompt in LONG_PROMPTS],
        max_new_tokens=24,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=4,
        teacher=teacher,
        alpha=alpha,
        shared_coins=False,
        on_batch=lambda rows, sampled: groups.append(rows),
    )
    lengths = sorted(map(len, completions))
    assert lengths[-1] > 1.5 * lengths[6]
    steps = [count for count in rows if count > 1 or alpha == 0.0]
    assert max(rows) == 4
    if alpha == 0.0:  # a step for each token, each with as many rows as there are
        assert sum(rows) == sum(lengths) + sum(len(prompt) > 1 for prompt in LONG_PROMPTS) - 4
        assert rows.count(4) > sum(lengths) / 4 - 24
    assert len(steps) < 3 * 24  # of three batches of four
    assert sorted(row for group in groups for row in group) == list(range(12))
    assert [len(group) for group in groups] == [4, 4, 4]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_columns_that_move_or_grow_change_no_sample(monkeypatch: pytest.MonkeyPatch, family: str):
    options = {"alpha": 0.3, "family": family, "batch_size": 3, "shared_coins": False, "keep_states": True}
    states = []

    def record(rows: list[int], sampled) -> None:
        states.append(dict(zip(rows, zip(*sampled[1:], strict=True), strict=True)))

    expected = sample(LONG_PROMPTS, **options, on_batch=record)
    moved = []
    move = Buffer.move
    monkeypatch.setattr(minillm_trl.rollouts.slots, "_FIRST_COLUMNS", 2)

    def recorded(self: Buffer, start: int, end: int, columns: int) -> None:
        moved.append((columns, columns == self.tensor.shape[self.dim]))
        move(self, start, end, columns)

    monkeypatch.setattr(Buffer, "move", recorded)
    assert sample(LONG_PROMPTS, **options, on_batch=record) == expected
    assert {in_place for _, in_place in moved} == {True, False}
    assert max(columns for columns, _ in moved) < 2 * (24 + 16)
    half = len(states) // 2
    for found, plain in zip(states[half:], states[:half], strict=True):
        for row, (mask, *parts) in found.items():
            for part, other in zip(parts, plain[row][1:], strict=True):
                torch.testing.assert_close(part[mask], other[mask], rtol=1e-4, atol=1e-4)


def test_completions_end_with_the_first_of_several_ends_or_at_the_limit():
    for completion in sample(LONG_PROMPTS, batch_size=4):
        assert not {0, 3} & set(completion[:-1])
        assert completion[-1] in (0, 3) or len(completion) == 24


def test_each_model_runs_only_at_its_own_steps(monkeypatch: pytest.MonkeyPatch):
    student, teacher = tiny(0), tiny(1)
    calls = []
    for name, model in (("student", student), ("teacher", teacher)):
        forward = model.forward

        def counted(*args, _name=name, _forward=forward, **kwargs):
            calls.append((_name, kwargs["input_ids"].shape[1]))
            return _forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
    sample_completions(
        student,
        torch.tensor([[1, 2]]),
        torch.ones(1, 2),
        max_new_tokens=6,
        eos_token_ids=[],
        pad_token_id=1,
        uniforms=torch.full((1, 6), 0.5, dtype=torch.float64),
        teacher=teacher,
        teacher_coins=np.array([[False, False, True, False, True, True]]),
    )
    assert calls == [("student", 2), ("student", 1), ("teacher", 4), ("student", 2), ("teacher", 2), ("teacher", 1)]


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(("family", "slots"), [*((family, 5) for family in FAMILIES), ("llama", 1)])
def test_states_that_sampling_leaves_behind_are_those_of_a_plain_forward_pass(
    family: str, slots: int, alpha: float, shared: bool
):
    student = build_model(family, vocab_size=50, width=16)
    teacher = build_model(family, vocab_size=50, width=24, seed=1)
    batches = []
    completions = sample_prompts(
        student,
        LONG_PROMPTS,
        keys=[(7, sum(prompt)) for prompt in LONG_PROMPTS],
        max_new_tokens=24,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=slots,
        teacher=teacher,
        alpha=alpha,
        shared_coins=shared,
        keep_states=True,
        on_batch=lambda rows, sampled: batches.append((rows, sampled)),
    )
    assert len({len(completion) for completion in completions}) > 3  # rows finish at different steps
    check_kept_states((student, teacher if alpha > 0 else None), LONG_PROMPTS, completions, batches)


@pytest.mark.parametrize("keep_states", [False, True])
def test_rows_with_shared_coins_leave_their_batch_soon_after_they_end(keep_states: bool):
    models = [build_model("llama", vocab_size=50, width=16, seed=seed) for seed in range(2)]
    read = [0, 0]
    for number, model in enumerate(models):

        def count(module, args, kwargs, number=number):
            read[number] += kwargs["input_ids"].numel()

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    rows = 24
    completions = sample_prompts(
        models[0],
        [[5, 6, 7]] * rows,
        keys=[(3, row) for row in range(rows)],
        max_new_tokens=80,
        eos_token_ids=[4],
        pad_token_id=1,
        teacher=models[1],
        alpha=0.3,
        coin_key=(5,),
        keep_states=keep_states,
    )
    lengths = [len(completion) for completion in completions]
    least = sum(lengths) + 2 * rows  # a model reads the prompt, and every token but the last
    assert max(lengths) * rows > 1.5 * sum(lengths)
    for tokens in read:  # the last tokens of a row wait for the model that has the coin
        assert tokens < 1.15 * least


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("keep_states", [True, False])
def test_process_without_prompts_makes_the_calls_of_another_one(shared: bool, keep_states: bool):
    """It replays the flags of the other process, which are those of both, as its own are always True."""

    def run(prompts: list[list[int]], on_every_process) -> tuple[list[list[int]], list[str]]:
        models, calls = [build_model("llama", vocab_size=50, width=16, layers=1, seed=seed) for seed in (0, 1)], []
        for name, model in zip(("student", "teacher"), models, strict=True):
            model.base_model.register_forward_pre_hook(lambda *unused, name=name: calls.append(name))
        completions = sample_prompts(
            models[0],
            prompts,
            keys=[(7, row) for row in range(len(prompts))],
            max_new_tokens=8,
            eos_token_ids=[0, 3],
            pad_token_id=1,
            batch_size=5,
            teacher=models[1],
            alpha=0.4,
            shared_coins=shared,
            keep_states=keep_states,
            on_every_process=on_every_process,
        )
        return completions, calls

    flags, own = [], []
    completions, calls = run(LONG_PROMPTS, lambda flag: flags.append(flag) or flag)
    answers = iter(flags)
    assert run([], lambda flag: own.append(flag) or next(answers)) == ([], calls)
    assert all(own)
    assert len(own) == len(flags)
    alone, _ = run(LONG_PROMPTS, None)
    assert completions == alone


@pytest.mark.parametrize("options", [{}, {"mixing": "speculative"}, {"keep_states": True}], ids=str)
def test_memory_of_caches_is_free_as_soon_as_sampling_ends(options: dict):
    """Not at the next garbage collection: each batch has caches of its own."""
    student, teacher = tiny(0), tiny(1)
    gc.collect()
    gc.disable()
    try:
        sample_prompts(
            student,
            PROMPTS,
            keys=[(0, 0), (0, 1)],
            max_new_tokens=4,
            eos_token_ids=[EOS],
            pad_token_id=EOS,
            teacher=teacher,
            alpha=0.5,
            **options,
        )
        assert not [found for found in gc.get_objects() if isinstance(found, Buffer)]
    finally:
        gc.enable()


@pytest.mark.parametrize("of_prompts", [True, False])
def test_cudnn_attention_and_gradients_are_off_while_sampling_alone(of_prompts: bool):
    model, seen = build_model("gpt2", vocab_size=50, width=16), []
    model.base_model.register_forward_hook(
        lambda *unused: seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.is_grad_enabled()))
    )
    options = {"max_new_tokens": 2, "eos_token_ids": [], "pad_token_id": 1}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for enabled in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        if of_prompts:
            sample_prompts(model, [[5]], keys=None, **options)
        else:
            sample_completions(model, torch.tensor([[5]]), torch.ones(1, 1), uniforms=None, **options)
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        assert torch.is_grad_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [(False, False)] * 4


@torch.no_grad()
def test_neither_model_reads_a_token_twice():
    models = {"student": build_model("gpt2", vocab_size=50, width=16), "teacher": build_model("gpt2", 50, 1, 24)}
    read = dict.fromkeys(models, 0)
    for name, model in models.items():

        def count(module, args, kwargs, name=name):
            read[name] += kwargs["input_ids"].shape[1]

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    sample_completions(
        models["student"],
        torch.full((2, 7), 4),
        torch.ones(2, 7),
        max_new_tokens=20,
        eos_token_ids=[],
        pad_token_id=1,
        uniforms=None,
        teacher=models["teacher"],
        teacher_coins=toss_coins(20, 0.3, 1)[None],
        keep_states=True,
    )
    assert 7 + 20 - 1 <= min(read.values()) <= max(read.values()) <= 7 + 20


def test_coins_without_a_teacher_are_refused():
    ids, coins = torch.tensor([[1, 2]]), np.array([[True, False]])
    options = {"max_new_tokens": 2, "eos_token_ids": [EOS], "pad_token_id": 1, "uniforms": None}
    with pytest.raises(ValueError, match=r"teacher_coins .* teacher is None"):
        sample_completions(tiny(0), ids, torch.ones_like(ids), teacher_coins=coins, **options)


class TestCheckDecoding:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_attention_of_any_kind_passes(self, family: str):
        check_decoding(build_model(family), "student")

    def test_large_logits_have_a_larger_tolerance(self):
        model = build_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(1e4)
        check_decoding(model, "student")

    def test_recurrent_layers_are_refused(self):
        config = Mamba2Config(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1)
        with pytest.raises(ValueError, match=r"The student .* has recurrent layers"):
            check_decoding(Mamba2ForCausalLM(config).eval(), "student")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_cache_that_does_not_work_is_refused_in_any_precision(self, monkeypatch: pytest.MonkeyPatch, dtype):
        model = build_model("gpt2").to(dtype)
        check_decoding(model, "student")
        monkeypatch.setattr(Buffer, "copy_row", lambda *unused: None)
        with pytest.raises(ValueError, match="cannot decode several tokens at a time: its logits differ by up to"):
            check_decoding(model, "student")


def test_rows_of_the_vocabulary_beyond_the_shared_ones_are_never_sampled():
    completions = sample(LONG_PROMPTS, batch_size=4, alpha=0.5, vocab_size=10)
    assert max(max(completion) for completion in completions) < 10
    assert max(max(completion) for completion in sample(LONG_PROMPTS, batch_size=4, alpha=0.5)) >= 10


def test_greedy_decoding_equals_generate():
    model = build_model("gpt2", vocab_size=50, width=16)
    prompt = [7, 8, 9]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=0, pad_token_id=1
    )[0, 3:].tolist()
    actual = sample_prompts(model, [prompt, [4]], keys=None, max_new_tokens=10, eos_token_ids=[0], pad_token_id=1)
    assert actual[0] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_blocked_ngrams_are_those_of_generate(size: int):
    """Greedy decoding of a model that repeats itself, with prompts of different lengths and finished rows."""
    model = build_model("llama", vocab_size=40, seed=5).eval()
    model.generation_config = GenerationConfig(pad_token_id=1)
    prompts = [[5, 6, 7, 5, 6], [9], [8, 8, 8], [3, 4, 3, 4, 3, 4, 3]]
    options = {"max_new_tokens": 24, "eos_token_ids": [11], "pad_token_id": 1}
    plain = sample_prompts(model, prompts, keys=None, **options)
    blocked = sample_prompts(model, prompts, keys=None, no_repeat_ngram_size=size, **options)
    assert plain != blocked
    for prompt, completion in zip(prompts, blocked, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=11,
            no_repeat_ngram_size=size,
        )
        assert completion == expected[0, len(prompt) :].tolist()


def test_left_padding_leaves_a_column_without_any_token():
    ids, mask = left_pad([[5, 6], [], [7]], 1)
    assert ids.tolist() == [[5, 6], [1, 1], [1, 7]]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True], [False, False], [False, True]]
    assert [part.tolist() for part in left_pad([[]], 1)] == [[[1]], [[False]]]


class TestDrawTokens:
    def test_inverse_cdf_picks_the_token_whose_interval_holds_the_number(self):
        logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(5, -1)
        uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999999], dtype=torch.float64)
        assert draw_tokens(logits, uniforms, 1.0).tolist() == [0, 0, 1, 1, 2]

    @pytest.mark.parametrize("size", [3, 512, 1200])
    def test_row_of_nan_gets_some_token_and_leaves_the_others_alone(self, size: int):
        logits = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
        uniforms = torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64)
        clean = draw_tokens(logits, uniforms, 1.0)
        broken = logits.clone()
        broken[1, 0] = math.nan
        drawn = draw_tokens(broken, uniforms, 1.0)
        assert 0 <= drawn[1] < size
        assert drawn[[0, 2]].tolist() == clean[[0, 2]].tolist()

    def test_excluded_tokens_are_never_drawn(self):
        logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
        uniforms = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
        assert draw_tokens(logits, uniforms, 1.0).tolist() == [1, 3, 3]


class TestKeyedUniforms:
    def test_numbers_are_a_function_of_the_key(self):
        assert (keyed_uniforms(5, 1, 2) == keyed_uniforms(5, 1, 2)).all()
        assert (keyed_uniforms(5, 1, 2) == keyed_uniforms(9, 1, 2)[:5]).all()  # a longer limit keeps the first tokens
        assert (keyed_uniforms(5, 1, 2) != keyed_uniforms(5, 2, 1)).all()
        assert (keyed_uniforms(5, np.int64(7), 0) == keyed_uniforms(5, 7, 0)).all()

    def test_different_keys_never_share_numbers(self):
        """`SeedSequence` fills keys up with zeros, and takes a large number for several small ones."""
        values = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64)
        keys = [key for length in range(5) for key in product(values, repeat=length)]
        keys += [(*key, *more) for key in product((0, 1), repeat=4) for more in ((0,), (1,), (0, 0), (1, 0))]
        assert len({tuple(keyed_uniforms(2, *key)) for key in keys}) == len(set(keys)) == len(keys)

    def test_keys_of_the_package_keep_the_numbers_that_they_had(self):
        """A run that is resumed, or repeated with a later version, samples what it did."""
        keys = [(5, 7), (5, 0), (3, 0, 1, 2, 0), (3, 2, 4, 0, 1, 0), (3, 3, 1, 1), (3, 0, 2)]
        keys += [(3, 1, 2**32 - 1, 0, 0), (2**31, 7)]  # a checksum of a prompt, a large seed
        found = [keyed_uniforms(2, *key).tolist() for key in keys]
        expected = [np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(2) for key in keys]
        expected = [numbers.tolist() for numbers in expected]
        assert found == expected

    def test_rows_are_dealt_by_the_numbers_that_they_had(self):
        for step in (0, 4):
            keys = [(1, ROLLOUT_ORDER, step, block) for block in (0, 1)]
            orders = [np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(3) for key in keys]
            expected = np.stack([orders[0].argsort(), orders[1].argsort() + 3], axis=1).reshape(-1)
            assert deal_rows(6, 3, 0, 1, ROLLOUT_ORDER, step).tolist() == expected.tolist()

    def test_negative_number_is_refused(self):
        with pytest.raises(ValueError, match=r"non-negative integers, got \(1, -1\)"):
            keyed_uniforms(3, 1, -1)

    def test_coins_come_up_with_probability_alpha(self):
        tosses = [coin for seed in range(200) for coin in toss_coins(50, 0.2, seed)]
        assert sum(tosses) / len(tosses) == pytest.approx(0.2, abs=0.015)
        assert not any(toss_coins(50, 0.0, 1))
        assert all(toss_coins(50, 1.0, 1))


def test_own_coins_of_a_coin_key_follow_the_row_and_not_its_place_in_the_batch():
    student, teacher = (build_model("gpt2", 20, seed, width=8, layers=1) for seed in (0, 1))
    options = {"max_new_tokens": 12, "eos_token_ids": [], "pad_token_id": 1, "teacher": teacher, "alpha": 0.5}
    options |= {"coin_key": (9,), "shared_coins": False}
    prompts, keys = [[5], [6], [7, 8]], [(2, row) for row in range(3)]
    expected = sample_prompts(student, prompts, keys=keys, batch_size=3, **options)
    alone = [sample_prompts(student, [prompts[row]], keys=[keys[row]], **options)[0] for row in (2, 1, 0)]
    assert alone[::-1] == expected


class TestDefaultCoins:
    """Of `sample_prompts` that is not told a `coin_key`."""

    @staticmethod
    def coins(monkeypatch: pytest.MonkeyPatch, keys, shared: bool) -> list[tuple[int, ...]]:
        found = []

        def recorded(length: int, alpha: float, *key: int) -> np.ndarray:
            found.append(key)
            return toss_coins(length, alpha, *key)

        monkeypatch.setattr(minillm_trl.rollouts.coins, "toss_coins", recorded)
        with torch.random.fork_rng(devices=[]):  # it is seeded for each model
            models = [build_model("gpt2", vocab_size=10, seed=seed, width=8, layers=1) for seed in (0, 1)]
        options = {"max_new_tokens": 3, "eos_token_ids": [], "pad_token_id": 1, "batch_size": 2}
        sample_prompts(models[0], [[5]] * 4, keys=keys, teacher=models[1], alpha=0.5, shared_coins=shared, **options)
        return found

    @pytest.mark.parametrize("shared", [True, False])
    def test_they_are_a_function_of_the_keys_and_share_no_number_with_the_tokens(self, monkeypatch, shared: bool):
        keys = [[(call, row) for row in range(4)] for call in (0, 1)]
        first, again, second = (self.coins(monkeypatch, each, shared) for each in (keys[0], keys[0], keys[1]))
        assert first == again
        assert len({*first, *second}) == (4 if shared else 8)
        assert not {*first, *second} & {*keys[0], *keys[1]}

    @pytest.mark.parametrize("shared", [True, False])
    def test_without_keys_they_come_from_the_generator_of_torch(self, monkeypatch, shared: bool):
        torch.manual_seed(0)
        first, second = (self.coins(monkeypatch, None, shared) for _ in range(2))
        torch.manual_seed(0)
        assert self.coins(monkeypatch, None, shared) == first
        assert len({*first, *second}) == (4 if shared else 8)


def test_cache_goes_under_the_name_that_the_model_takes():
    """transformers 5.24 has renamed the argument, and warns of the old name in each forward pass."""

    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None): ...

    assert [cache_argument(model()) for model in (Old, New)] == ["past_key_values", "cache"]
