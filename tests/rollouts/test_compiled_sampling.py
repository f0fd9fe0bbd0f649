"""Compiled steps sample what the loop over slots samples, in few shapes, and say when they are not compiled."""

import gc
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from conftest import build_model
from transformers import PreTrainedModel

import minillm_trl.rollouts.compiled_steps
from minillm_trl.rollouts.compiled_sampling import check_compiled_decoding
from minillm_trl.rollouts.compiled_steps import CompiledDecoding, Reader, StepPlan
from minillm_trl.rollouts.sampling import Completions, sample_completions, sample_prompts

LONG_PROMPTS = [[5 + i, *range(6, 6 + (3 * i) % 11)] for i in range(12)]


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mistral", "gemma2"))],
)
def test_compiled_decoding_samples_the_same_from_batch_to_batch(family: str):
    model = build_model(family, vocab_size=50, width=16)
    options = {"alpha": 0.3, "teacher": build_model(family, 50, 1, 24)}
    compiled = CompiledDecoding(model, "eager")
    check_compiled_decoding(model, "student")
    keys = [(7, sum(prompt)) for prompt in LONG_PROMPTS]
    common = {"keys": keys, "max_new_tokens": 24, "eos_token_ids": [0, 3], "pad_token_id": 1, "batch_size": 4}
    expected = sample_prompts(model, LONG_PROMPTS, **common, **options)
    for keep_states in (True, False, True, False):
        options |= {"keep_states": keep_states, "compiled": compiled}
        assert sample_prompts(model, LONG_PROMPTS, **common, **options) == expected
    assert len(compiled._shapes) == 1
    steps, all_steps = compiled.take_counts()
    assert 0 < steps == all_steps


def test_compiled_decoding_reads_columns_in_steps_of_few_widths(monkeypatch: pytest.MonkeyPatch):
    student, teacher = (build_model("llama", vocab_size=50, seed=seed, width=16) for seed in (0, 1))
    compiled = CompiledDecoding(student, "eager", teacher)
    widths: list[tuple[str, int]] = []
    run = Reader._run

    def recorded(reader: Reader, plan: StepPlan) -> None:
        widths.append(("student" if reader.model is student else "teacher", plan.width))
        run(reader, plan)

    monkeypatch.setattr(Reader, "_run", recorded)
    monkeypatch.setattr(Reader, "_compile", lambda reader, plan: lambda: bool(reader._run(plan)) or True)
    coins = np.array([[False, False, True, False, *[True] * 5, False, *[False] * 18, True, False]])
    sample_completions(
        student,
        torch.tensor([[5, 6, 7]]),
        torch.ones(1, 3),
        max_new_tokens=coins.shape[1],
        eos_token_ids=[],
        pad_token_id=1,
        uniforms=None,
        teacher=teacher,
        teacher_coins=coins,
        compiled=compiled,
    )
    own = {name: [width for model, width in widths if model == name] for name in ("student", "teacher")}
    # prompts come first, with the columns before them; two new columns take a step of four, twenty run at once
    assert own["student"] == [16, 1, 4, 16, *[1] * 18, 4]
    assert own["teacher"] == [18, 4, 1, 1, 1, 1, 20]
    assert compiled.take_counts() == (len(own["student"]) - 1 + len(own["teacher"]) - 2,) * 2


@pytest.mark.parametrize(
    ("shared_coins", "temperature"), [(True, 0.7), pytest.param(False, 1.0, marks=pytest.mark.slow)]
)
def test_compiled_steps_of_both_models_sample_what_the_loop_samples(shared_coins: bool, temperature: float):
    student, teacher = (build_model("llama", 50, seed, width=16, layers=1) for seed in (0, 1))
    compiled = CompiledDecoding(student, "aot_eager", teacher)
    options = {
        "keys": [(7, sum(prompt)) for prompt in LONG_PROMPTS],
        "max_new_tokens": 24,
        "eos_token_ids": [0, 3],
        "pad_token_id": 1,
        "batch_size": 5,
        "teacher": teacher,
        "alpha": 0.3,
        "shared_coins": shared_coins,
        "temperature": temperature,
        "keep_states": True,
    }
    found, kept = [], []
    for steps in (None, compiled):
        batches: dict[int, list[torch.Tensor]] = {}

        def keep(rows: list[int], sampled: Completions, batches=batches) -> None:
            for row, *parts in zip(rows, *sampled[1:], strict=True):
                batches[row] = [states[parts[0]] for states in parts[1:]]

        found.append(sample_prompts(student, LONG_PROMPTS, **options, on_batch=keep, compiled=steps))
        kept.append([states for row in sorted(batches) for states in batches[row]])
    assert found[0] == found[1]
    assert len({len(completion) for completion in found[0]}) > 3
    for plain, own in zip(*kept, strict=True):
        assert torch.allclose(plain, own, atol=1e-5)
    steps, all_steps = compiled.take_counts()
    assert steps == all_steps > 0


@pytest.mark.parametrize(("backend", "mode"), [("inductor", "reduce-overhead"), ("cudagraphs", None)])
def test_cuda_graphs_get_fixed_shapes_and_addresses(monkeypatch: pytest.MonkeyPatch, backend: str, mode: str | None):
    """Of all tensors that steps read and write; for weights of the bodies PyTorch sees to it."""
    asked, begun, marked = [], [], []
    monkeypatch.setattr(torch, "compile", lambda step, **options: asked.append(options) or step)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    monkeypatch.setattr(torch._dynamo, "mark_static_address", marked.append)
    student, teacher = (build_model("llama", 50, seed, width=16, layers=1) for seed in (0, 1))
    compiled = CompiledDecoding(student, backend, teacher)
    options = {"max_new_tokens": 8, "eos_token_ids": [], "pad_token_id": 1, "keys": [(1,), (2,)]}
    options |= {"teacher": teacher, "alpha": 0.5, "keep_states": True, "compiled": compiled}
    addresses = []
    for prompts in ([[5, 6, 7], [5, 9]], [[4], [8, 8]]):
        sample_prompts(student, prompts, **options)
        tensors, readers = compiled.start([student, teacher], 2, 20)
        used = list(vars(tensors).values())
        for reader in readers:
            layers = [tensor for layer in reader._cache.layers for tensor in (layer.keys, layer.values)]
            used += [reader._position, reader.states, reader.head.weight, *layers]
        assert all(any(tensor is other for other in marked) for tensor in used)
        addresses.append([tensor.data_ptr() for tensor in used])
    assert addresses[0] == addresses[1]
    assert asked == [{"backend": backend, "dynamic": False, "mode": mode}] * len(asked)
    assert len(begun) == compiled.take_counts()[1] > len(asked) > 1


def test_batch_after_one_with_nan_samples_as_if_it_were_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Reader, "_compile", lambda reader, plan: lambda: bool(reader._run(plan)) or True)
    student, teacher = (build_model("llama", 50, seed, width=16, layers=1) for seed in (0, 1))
    compiled = CompiledDecoding(student, "eager", teacher)
    prompts, options = [[5, 6, 7], [5, 9]], {"eos_token_ids": [], "pad_token_id": 1, "keys": [(1,), (2,)]}
    options |= {"teacher": teacher, "alpha": 0.5, "coin_key": (3,)}
    expected = sample_prompts(student, prompts, **options, max_new_tokens=8)
    for model in (student, teacher):
        weight = model.get_input_embeddings().weight.data
        whole = weight.clone()
        weight[6:].fill_(torch.nan)  # in the first prompt, and in most later columns
        sample_prompts(student, prompts, **options, max_new_tokens=24, compiled=compiled)
        weight.copy_(whole)
        assert sample_prompts(student, prompts, **options, max_new_tokens=8, compiled=compiled) == expected


def test_n_grams_cannot_be_blocked_in_compiled_steps():
    student = build_model("gpt2")
    options = {"max_new_tokens": 2, "eos_token_ids": [3], "pad_token_id": 1, "keys": None}
    with pytest.raises(ValueError, match="no_repeat_ngram_size=2 does not work with compiled steps"):
        sample_prompts(student, [[5]], **options, no_repeat_ngram_size=2, compiled=CompiledDecoding(student, "eager"))


def sample_compiled(compiled: CompiledDecoding | None, student, teacher, rows: int, length: int) -> list[list[int]]:
    return sample_prompts(
        student,
        [[5] * length] * rows,
        keys=[(3, row) for row in range(rows)],
        max_new_tokens=24,
        eos_token_ids=[],
        pad_token_id=1,
        teacher=teacher,
        alpha=0.4,
        coin_key=(length,),
        compiled=compiled,
    )


@pytest.fixture
def long_models() -> list[PreTrainedModel]:
    return [build_model("llama", 50, seed, width=16, layers=1, positions=1024) for seed in (0, 1)]


def test_prompts_of_all_lengths_run_compiled_over_caches_of_bounded_size(long_models):
    student, teacher = long_models
    compiled = CompiledDecoding(student, "eager")
    for length, rows in product((20, 150, 300, 20, 600), (4, 3)):
        expected = sample_compiled(None, student, teacher, rows, length)
        assert sample_compiled(compiled, student, teacher, rows, length) == expected
    steps, all_steps = compiled.take_counts()
    assert steps == all_steps > 100
    sizes = [rows * length for rows, length in compiled._shapes]
    assert sum(sizes) < 2 * max(sizes)


def test_lengths_up_to_a_power_of_two_share_their_tensors():
    compiled = CompiledDecoding(build_model("gpt2"), "eager")
    shapes = [compiled.start(compiled.models, 2, length)[0].shape for length in (130, 200, 256, 257)]
    assert shapes == [(2, 256)] * 3 + [(2, 512)]
    assert len(compiled._shapes) == 2


def test_cache_that_is_not_used_any_more_is_freed(long_models, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(minillm_trl.rollouts.compiled_steps, "_IDLE_BATCHES", 2)
    student, teacher = long_models
    compiled = CompiledDecoding(student, "eager")
    sample_compiled(compiled, student, teacher, 2, 200)
    ((shape,),) = [compiled._shapes.values()]
    (reader,) = shape.readers
    kept = [weakref.ref(thing) for thing in (reader._cache.layers[0].keys, next(iter(reader._functions.values())))]
    del shape, reader
    for _ in range(3):
        assert all(reference() is not None for reference in kept)
        sample_compiled(compiled, student, teacher, 2, 20)
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    assert list(compiled._shapes) == [(2, 128)]


def test_step_that_is_not_compiled_is_counted_and_said_once(long_models, caplog):
    student, teacher = long_models
    compiled = CompiledDecoding(student, "eager")
    sample_compiled(compiled, student, teacher, 2, 20)
    with torch.compiler.set_stance("force_eager"):
        sample_compiled(compiled, student, teacher, 2, 20)
        sample_compiled(compiled, student, teacher, 2, 20)
    steps, all_steps = compiled.take_counts()
    assert 0 < steps < all_steps
    assert compiled.take_counts() == (0, 0)
    assert caplog.text.count("rollout/compiled_steps") == 1
