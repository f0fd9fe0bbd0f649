"""The decoder of rows in slots against plain forward passes, what it reads, and which models are refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_model
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer, StaticLayer

import minillm_trl.rollouts.decoding
from minillm_trl.rollouts.decoding import LazyDecoder, check_decoding
from minillm_trl.rollouts.sampling import sample_prompts
from minillm_trl.rollouts.slots import Slots

VOCAB = 50
PROMPTS = [[5 + i, *range(6, 6 + (3 * i) % 11)] for i in range(12)]


def build(family: str, seed: int = 0) -> PreTrainedModel:
    return build_model(family, VOCAB, seed, width=16, layers=2)


def plain_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_logits_are_those_of_plain_passes_wherever_rows_come_and_go(family: str, keep_states: bool):
    """Rows leave any slot, others take it later, and the decoder reads now and then, for some of the rows."""
    model, draws = build(family), np.random.default_rng(1)
    slots = Slots(3, torch.device("cpu"))
    decoder = LazyDecoder(model, VOCAB - 7, slots, keep_states)
    texts: dict[int, list[int]] = {}
    admitted = checked = 0
    for step in range(40):
        while slots.count < 3 and (step == 0 or draws.random() < 0.6):
            room = 9 if slots.count == 0 else min(9, slots.end - slots.base)
            texts[admitted] = draws.integers(2, VOCAB, draws.integers(1, room + 1)).tolist()
            if step == 0 and admitted == 0:
                texts[0] = draws.integers(2, VOCAB, 9).tolist()  # the longest comes first
            slots.admit([admitted], [texts[admitted]])
            admitted += 1
        rows = slots.row[: slots.count].tolist()
        what = draws.random()
        if what < 0.2:
            decoder.feed()
        elif what < 0.3 and decoder.cache.fed < slots.end - 1:
            decoder.feed(slots.end - 1)
        elif what < 0.8:
            wanted = np.flatnonzero(draws.random(slots.count) < 0.7)
            found = decoder.next_logits(wanted)
            for slot, logits in zip(wanted, found, strict=True):
                expected = plain_logits(model, texts[rows[slot]])[-1, : VOCAB - 7]
                torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
                checked += 1
            if keep_states:
                before = slots.first[wanted] + draws.integers(-1, slots.sampled[wanted])
                places = before - slots.start[wanted]
                for slot, place, logits in zip(wanted, places, decoder.logits_at(wanted, before), strict=True):
                    expected = plain_logits(model, texts[rows[slot]])[place, : VOCAB - 7]
                    if slots.sampled[slot]:  # states of prompts that came later are not kept
                        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        tokens = draws.integers(2, VOCAB, slots.count)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            texts[row].append(token)
        slots.append(torch.from_numpy(tokens), np.zeros(slots.count, dtype=bool))
        if step % 3 == 2:
            slots.release(np.flatnonzero(draws.random(slots.count) < 0.5))
            if slots.count == 0:
                slots.admit([admitted], [draws.integers(2, VOCAB, 4).tolist()])
                texts[admitted] = slots.ids[0].tolist()
                admitted += 1
    assert checked > 20
    assert admitted > 10


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("shared", [True, False])
def test_models_read_each_token_once_and_project_the_newest_alone(alpha: float, shared: bool):
    """Logits of a long prompt would fill the memory, and a token that is read twice takes twice the time."""
    models = [build("llama", seed) for seed in (0, 1)]
    read, projected = [0, 0], []
    for number, model in enumerate(models):

        def count(module, args, kwargs, number=number):
            length = kwargs["input_ids"].shape[1]
            read[number] += int(kwargs["attention_mask"][:, -length:].sum())

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        model.lm_head.register_forward_pre_hook(lambda module, args: projected.append(args[0].shape[1]))
    completions = sample_prompts(
        models[0],
        PROMPTS,
        keys=[(7, row) for row in range(len(PROMPTS))],
        max_new_tokens=24,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=4,
        teacher=models[1],
        alpha=alpha,
        shared_coins=shared,
    )
    tokens = sum(map(len, PROMPTS)) + sum(map(len, completions)) - len(PROMPTS)  # nobody reads the last one
    if alpha == 0.0:
        assert read == [tokens, 0]
    else:
        assert max(read) <= tokens
        assert min(read) > 0.5 * tokens
    assert set(projected) == {1}


def fails_where(condition) -> PreTrainedModel:
    """Return a model that reads other tokens in passes with a cache where `condition(rows, length, past)` holds."""
    model = build("gpt2")

    def shift(module, args, kwargs):
        rows, length = kwargs["input_ids"].shape
        past = kwargs["attention_mask"].shape[1] - length
        if kwargs.get("use_cache") and condition(rows, length, past):
            return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % VOCAB}
        return None

    model.register_forward_pre_hook(shift, with_kwargs=True)
    return model


class TestCheckDecoding:
    @pytest.mark.parametrize(
        "condition",
        [
            lambda rows, length, past: length > 1 and past > 0,
            lambda rows, length, past: length == 1 and past > 0,
            lambda rows, length, past: rows == 1 and past == 0,
            lambda rows, length, past: rows > 1 and past == 0,
        ],
        ids=["several tokens after others", "one token after others", "a later prompt", "first prompts"],
    )
    def test_model_that_fails_in_one_kind_of_pass_is_refused(self, condition):
        check_decoding(fails_where(lambda *unused: False), "student")
        with pytest.raises(ValueError, match=r"The student .* cannot decode several tokens at a time"):
            check_decoding(fails_where(condition), "student")

    @pytest.mark.parametrize("error", [-10.0, 10.0, float("nan")])
    def test_logits_that_are_all_lower_or_higher_are_refused(self, error: float):
        model = build("gpt2")

        def add(module, args, kwargs, output):
            output.logits += error if kwargs["use_cache"] else 0.0

        model.register_forward_hook(add, with_kwargs=True)
        with pytest.raises(ValueError, match="cannot decode several tokens at a time"):
            check_decoding(model, "student")

    @pytest.mark.parametrize("shift", [3e4, -3e4])
    def test_tolerance_is_relative_to_the_largest_logit(self, shift: float):
        """An error of 3 at logits of 30,000 is rounding, not a fault."""
        model = build("gpt2")

        def add(module, args, kwargs, output):
            output.logits = (output.logits + shift) * (1.0001 if kwargs["use_cache"] else 1.0)

        model.register_forward_hook(add, with_kwargs=True)
        check_decoding(model, "student")

    def test_model_that_takes_no_positions_gets_none(self):
        model = build("bloom")

        class Strict(type(model)):
            def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=None, logits_to_keep=0):
                inputs = {"past_key_values": past_key_values, "use_cache": use_cache}
                return super().forward(
                    input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **inputs
                )

        model.__class__ = Strict
        check_decoding(model, "student")

    @pytest.mark.parametrize(
        ("layer", "message"),
        [(StaticLayer(8), r"has cache layers \{'StaticLayer'\}"), (LinearAttentionLayer(), "has recurrent layers")],
        ids=["static", "recurrent"],
    )
    def test_one_layer_of_another_kind_is_enough(self, monkeypatch: pytest.MonkeyPatch, layer, message: str):
        layers = [DynamicLayer(), layer]
        monkeypatch.setattr(
            minillm_trl.rollouts.decoding, "DynamicCache", lambda config: SimpleNamespace(layers=layers)
        )
        with pytest.raises(ValueError, match=f"The teacher .* {message}"):
            check_decoding(build("gpt2"), "teacher")
