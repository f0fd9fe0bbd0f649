"""Rows in slots against plain lists of tokens, after operations in any order, and the room that they take."""

import numpy as np
import pytest
import torch
from conftest import build_model
from transformers import PreTrainedModel

import minillm_trl.rollouts.slots
from minillm_trl.rollouts.decoding import LazyDecoder
from minillm_trl.rollouts.slots import Slots

VOCAB, SIZE = 20, 4
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # of rotations, which are float32


class Rows:
    """Rows in slots, a list of tokens for each as the reference, and a decoder with and one without kept states.

    The operations are those of the loops that decode: a token for each row, or a block of drafts, of which the rows
    keep a part.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, seed: int):
        self.model, self.slots, self.random = model, slots, np.random.default_rng(seed)
        self.decoders = [LazyDecoder(model, VOCAB, slots, keep_states) for keep_states in (True, False)]
        self.prompts: list[list[int]] = []
        self.completions: list[list[int]] = []
        self.released = self.aligned = 0

    def admit(self) -> None:
        count = self.random.integers(SIZE - self.slots.count + 1)
        longest = min(5, self.slots.end) if self.slots.count else 5
        prompts = [self._tokens(self.random.integers(1, longest + 1)) for _ in range(count)]
        if count:
            self.slots.admit(range(len(self.prompts), len(self.prompts) + count), prompts)
        self.prompts += prompts
        self.completions += [[] for _ in prompts]

    def append(self) -> None:
        """Append a token for each row, with which a few of them finish."""
        slots = self.slots
        if not slots.count:
            return
        tokens = self._tokens(slots.count)
        for slot in np.flatnonzero(slots.unfinished):
            self.completions[slots.row[slot]].append(tokens[slot])
        slots.append(torch.tensor(tokens), self.random.random(slots.count) < 0.1)

    def draft(self) -> None:
        """Append a block of tokens, and replace one of them in half of the rows, which drops what follows."""
        slots, length = self.slots, self.random.integers(1, 6)
        drafting = np.flatnonzero(slots.unfinished)
        if not len(drafting):
            return
        slots.reserve(length)
        start, before = slots.end, slots.sampled.copy()
        for _ in range(length):
            self.append()
        for decoder in self.decoders:
            if decoder.cache.fed < slots.end - 1:
                decoder.feed(slots.end - 1)
        kept = {slot: int(slots.sampled[slot] - before[slot]) for slot in drafting}
        replaced = [slot for slot in drafting if self.random.random() < 0.5]
        kept |= {slot: int(self.random.integers(kept[slot])) + 1 for slot in replaced}
        end = start + max(kept.values())
        for slot in replaced:
            sampled, token, finishes = before[slot] + kept[slot], self._tokens(1), self.random.random() < 0.1
            self.completions[slots.row[slot]][sampled - 1 :] = token
            slots.replace(slot, start + kept[slot] - 1, *token, sampled, finishes, end)
        slots.cut(end)
        self.release()
        if slots.count and (self.decoders[0].cache.has_windows or self.random.random() < 0.5):
            self.aligned += slots.holes.any()
            slots.align()
            assert not slots.holes.any()

    def feed(self) -> None:
        """Let each decoder read all columns but the newest one, or not."""
        for decoder in self.decoders:
            if decoder.cache.fed < self.slots.end - 1 and self.random.random() < 0.7:
                decoder.feed(self.slots.end - 1)

    def release(self) -> None:
        """Check and release the finished rows whose states are known."""
        slots, cache = self.slots, self.decoders[0].cache
        finished = np.flatnonzero(~slots.unfinished & (slots.last[: slots.count] <= cache.fed))
        for slot in finished:
            prompt, completion = (texts[slots.row[slot]] for texts in (self.prompts, self.completions))
            tokens, columns = slots.tokens(slot)
            assert tokens.tolist() == completion
            states = self.model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
            torch.testing.assert_close(cache.states(slot, columns), states[len(prompt) - 1 : -1], **ROUNDING)
        self.released += len(finished)
        slots.release(finished)

    def check(self) -> None:
        """Compare tokens with the lists, and logits with those of plain forward passes; then append a token."""
        slots = self.slots
        if not slots.count:
            return
        texts = [self.prompts[row] + self.completions[row] for row in slots.row[: slots.count]]
        assert [ids[mask].tolist() for ids, mask in zip(slots.ids, slots.mask, strict=True)] == texts
        assert slots.sampled[: slots.count].tolist() == [
            len(self.completions[row]) for row in slots.row[: slots.count]
        ]
        starts = slots.base + slots.mask.long().argmax(dim=1)
        assert slots.start[: slots.count].tolist() == starts.tolist()
        assert slots.base == starts.min() >= 0
        wanted = np.flatnonzero(slots.unfinished)
        if len(wanted):
            expected = torch.cat([self.model(torch.tensor([texts[slot]])).logits[:, -1] for slot in wanted])
            for decoder in self.decoders:
                torch.testing.assert_close(decoder.next_logits(wanted), expected, **ROUNDING)
            self.append()

    def _tokens(self, count: int) -> list[int]:
        return self.random.integers(VOCAB, size=count).tolist()


@torch.no_grad()
@pytest.mark.parametrize("longest", [None, 40])
@pytest.mark.parametrize(("family", "seed"), [("gpt2", 0), ("gpt2", 1), ("llama", 2), ("gemma2", 3)])
def test_operations_in_any_order_leave_tokens_states_and_logits_right(
    monkeypatch: pytest.MonkeyPatch, family: str, seed: int, longest: int | None
):
    monkeypatch.setattr(minillm_trl.rollouts.slots, "_FIRST_COLUMNS", 2)
    monkeypatch.setattr(minillm_trl.rollouts.slots, "_SPARE_COLUMNS", 3)
    model = build_model(family, VOCAB, width=8, layers=1, positions=256).double()
    rows = Rows(model, Slots(SIZE, torch.device("cpu"), longest), seed)
    rows.admit()
    operations = [rows.admit, rows.append, rows.append, rows.draft, rows.feed, rows.release, rows.check]
    for number in rows.random.integers(len(operations), size=120):
        operations[number]()
    rows.check()
    assert rows.released > 10
    assert rows.aligned > 1


def fill(slots: Slots, columns: int) -> None:
    for _ in range(columns):
        slots.append(torch.zeros(slots.count, dtype=torch.long), np.zeros(slots.count, dtype=bool))


@pytest.mark.parametrize(("longest", "columns"), [(None, [266, 532, 532, 1064]), (300, [266, 364, 364, 533])])
def test_buffers_grow_by_doubling_or_up_to_the_longest_row(longest: int | None, columns: list[int]):
    """With some spare columns; they grow beyond only where a row needs it."""
    slots = Slots(2, torch.device("cpu"), longest)
    slots.admit([0], [[5] * 10])
    found = [slots.columns]
    for end in (266 + 1, 364, 533):
        fill(slots, end - slots.end)
        found.append(slots.columns)
    assert (slots.base, slots.end) == (0, 533)
    assert found == columns


@pytest.mark.parametrize("longest", [None, 300])
def test_columns_that_no_row_uses_are_used_again(longest: int | None):
    slots = Slots(2, torch.device("cpu"), longest)
    slots.admit([0], [[5] * 10])
    fill(slots, 100)
    slots.admit([1], [[6] * 3])
    slots.release(np.array([0]))
    fill(slots, 266 - 110)
    assert (slots.base, slots.end, slots.columns) == (107, 266, 266)
    fill(slots, 1)
    assert (slots.base, slots.end, slots.columns) == (0, 160, 266)
    assert (slots.start[0], slots.first[0], slots.sampled[0], slots.last[0]) == (0, 3, 157, -1)
    assert slots.ids[0].tolist() == [6, 6, 6] + [0] * 157
    assert slots.mask.all()


def test_few_columns_without_a_row_do_not_stop_growth():
    """Moving copies the caches, so it waits until a quarter of the columns is free."""
    slots = Slots(2, torch.device("cpu"))
    slots.admit([0], [[5] * 10])
    fill(slots, 50)
    slots.admit([1], [[6] * 3])
    slots.release(np.array([0]))
    fill(slots, 267 - 60)
    assert (slots.base, slots.end, slots.columns) == (0, 210, 532)


@torch.no_grad()
@pytest.mark.parametrize("read", [50, 109, 110, 200, 266])
@pytest.mark.parametrize("keep_states", [False, True])
def test_caches_follow_columns_that_move(keep_states: bool, read: int):
    """Each column is read once, wherever the cache ended before; the rows that stay start at column 109."""
    model, widths = build_model("llama", VOCAB, width=8, layers=1, positions=512).double(), []
    model.base_model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    slots = Slots(3, torch.device("cpu"))
    decoder = LazyDecoder(model, VOCAB, slots, keep_states)
    slots.admit([0], [[5] * 10])
    fill(slots, 100)
    if read < 109:
        decoder.feed(read)
    slots.admit([1, 2], [[6], [7]])
    if read == 109:
        decoder.feed(read)
    for _ in range(2):  # the last row moves to the first slot
        slots.release(np.array([0]))
    if read >= 110:
        fill(slots, read - 110)
        decoder.feed(read)
    fill(slots, 267 - slots.end)
    assert (slots.base, slots.end, slots.columns) == (0, 158, 266)
    assert decoder.cache.fed == max(read - 109, 0)
    widths.clear()
    expected = model(torch.tensor([[6] + [0] * 157])).logits[:, -1]
    torch.testing.assert_close(decoder.next_logits(np.array([0])), expected, **ROUNDING)
    assert widths == [158, 158 - max(read - 109, 0)]


def test_columns_grow_where_those_in_use_and_the_reserved_ones_do_not_fit():
    """Also where many could be used again."""
    slots = Slots(2, torch.device("cpu"))
    slots.admit([0], [[5] * 10])
    fill(slots, 100)
    slots.admit([1], [[6] * 3])
    slots.release(np.array([0]))
    slots.reserve(300)
    assert (slots.base, slots.end) == (0, 3)
    assert slots.columns >= 303


def test_keys_and_values_may_differ_in_width():
    """As those of DeepSeek-V3 do."""
    slots = Slots(3, torch.device("cpu"))
    cache = LazyDecoder(build_model("gpt2", VOCAB, width=8, layers=1), VOCAB, slots).cache
    slots.admit([0, 1], [[5, 6], [7]])
    states = torch.randn(2, 4, 2, 6), torch.randn(2, 4, 2, 3)
    found = cache.update(*states, 0)
    assert all(torch.equal(*pair) for pair in zip(found, states, strict=True))
    assert cache.get_max_length() == -1  # without a limit, for transformers


def test_a_prompt_may_start_before_the_rows_that_are_there():
    slots = Slots(3, torch.device("cpu"))
    slots.admit([9], [[5]])
    assert (slots.base, slots.end) == (0, 1)
    slots.release(np.array([0]))
    slots.admit([0], [[5] * 6])
    assert (slots.base, slots.end) == (0, 6)
    slots.admit([1], [[6]])
    fill(slots, 1)
    slots.release(np.array([0]))
    assert (slots.base, slots.end) == (5, 7)
    slots.admit([2], [[7, 8, 9, 4]])
    assert (slots.base, slots.end) == (3, 7)
    assert slots.ids[1].tolist() == [7, 8, 9, 4]
    assert slots.mask.tolist() == [[False, False, True, True], [True] * 4]


def test_first_rows_of_a_new_start_leave_no_trace_of_earlier_ones():
    slots = Slots(3, torch.device("cpu"))
    slots.admit([0, 1, 2], [[5] * 6] * 3)
    slots.release(np.array([1, 2]))
    fill(slots, 1)
    slots.admit([3], [[7]])
    slots.release(np.array([0]))
    fill(slots, 1)
    slots.release(np.array([0]))
    assert slots.count == 0
    slots.admit([4, 5, 6], [[8, 9, 8, 9, 8], [9], [9]])
    assert slots.mask.tolist() == [[True] * 5, [False] * 4 + [True], [False] * 4 + [True]]
