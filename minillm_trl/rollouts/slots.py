"""Rows that decode together, one in each slot, over columns that all of them share, and KV caches of these columns.

A row's tokens end at the newest column; the columns before its first token are left padding, which every architecture
can mask. So a slot whose row has finished takes the next prompt at any time: the prompt is written into the columns
that end at the newest one. Buffers are allocated once, written in place, and read through views. They grow by
doubling, unless enough columns at their start belong to no row any more: then the rest moves to the front.
"""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

_FIRST_COLUMNS = 256  # room for tokens in buffers that are new
_SPARE_COLUMNS = 64  # beyond the longest row: moving columns copies the caches, but only after this many steps
_DEAD_SHARE = 0.25  # of columns that no row uses any more: from here on, move the others instead of growing


class Buffer:
    """A tensor `(slots, columns, ...)`, or with its columns in dimension 2, that is written in place and can grow."""

    def __init__(self, like: torch.Tensor, slots: int, columns: int, dim: int):
        shape = list(like.shape)
        shape[0], shape[dim] = slots, columns
        # zeros, since attention multiplies masked values by 0, and memory may hold NaN
        self.tensor, self.dim = like.new_zeros(shape), dim

    def view(self, rows: int, start: int, end: int) -> torch.Tensor:
        """Return the columns `[start, end)` of the first rows."""
        return self.tensor[:rows].narrow(self.dim, start, end - start)

    def move(self, start: int, end: int, columns: int) -> None:
        """Move the columns `[start, end)` to the front of a buffer that has `columns` of them."""
        kept = self.view(len(self.tensor), start, end)
        if columns == self.tensor.shape[self.dim]:
            kept = kept.clone()  # source and target overlap
        else:
            self.tensor = Buffer(self.tensor, len(self.tensor), columns, self.dim).tensor
        self.view(len(self.tensor), 0, end - start).copy_(kept)

    def copy_row(self, source: int, target: int, start: int, end: int) -> None:
        self.tensor[target].narrow(self.dim - 1, start, end - start).copy_(
            self.tensor[source].narrow(self.dim - 1, start, end - start)
        )

    def gather(self, columns: torch.Tensor, start: int) -> None:
        """Replace the columns from `start` on by the columns `(rows, n)`, which are counted from `start`."""
        rows, length = columns.shape
        view = self.view(rows, start, start + length)
        numbers = torch.arange(rows, device=view.device)[:, None]
        columns = columns.to(view.device)
        if self.dim == 1:
            view.copy_(view[numbers, columns])
        else:  # advanced indices around a slice put the columns first
            view.copy_(view.transpose(1, 2)[numbers, columns].transpose(1, 2))


class Slots:
    """The rows that decode together, their tokens, and the columns of these tokens.

    The first `count` slots are in use; arrays over slots are valid for them.

    Args:
        size (`int`): number of slots.
        device (`torch.device`): device of `ids` and `mask`.
        longest (`int`, *optional*): tokens of the longest row. Buffers do not grow beyond it while columns can be
            reused.

    Attributes:
        row (`np.ndarray` of shape `(S,)`): number of the row in each slot.
        start, first (`np.ndarray` of shape `(S,)`): columns of the row's first token, and of its first sampled one.
        sampled (`np.ndarray` of shape `(S,)`): number of tokens that it has sampled.
        last (`np.ndarray` of shape `(S,)`): column of its last token if it has finished, else -1.
        base, end (`int`): the columns in use. No row starts before `base`.
    """

    def __init__(self, size: int, device: torch.device, longest: int | None = None):
        self.size = size
        self._limit = None if longest is None else longest + _SPARE_COLUMNS
        self.count = self.base = self.end = self.columns = 0
        self.row, self.start, self.first, self.sampled, self.last = np.zeros((5, size), dtype=np.int64)
        self._ids = Buffer(torch.zeros(1, 1, dtype=torch.long, device=device), size, 0, dim=1)
        self._mask = Buffer(torch.zeros(1, 1, dtype=torch.bool, device=device), size, 0, dim=1)
        self.caches: weakref.WeakSet[SlotCache] = weakref.WeakSet()  # a cycle would keep their memory after sampling

    @property
    def ids(self) -> torch.Tensor:
        """Tokens of the rows in the columns in use, `(count, end - base)`."""
        return self._ids.view(self.count, self.base, self.end)

    @property
    def mask(self) -> torch.Tensor:
        """Where these are tokens of the row, `(count, end - base)`."""
        return self._mask.view(self.count, self.base, self.end)

    @property
    def unfinished(self) -> np.ndarray:
        """Which rows have not finished, `(count,)`."""
        return self.last[: self.count] < 0

    def admit(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Give free slots to rows, whose prompts end at the newest column; a row without a prompt has finished.

        Only the first rows may have prompts that are longer than all columns in use.
        """
        longest = max(1, max(map(len, prompts)))
        if self.count == 0:
            self.base = max(self.end - longest, 0)
        missing = longest - self.end
        if missing > 0:
            assert self.count == 0, "a later prompt is longer than the tokens of every row"
            self.end += missing
        self.reserve(0)
        for row, prompt in zip(rows, prompts, strict=True):
            slot, start = self.count, self.end - max(1, len(prompt))
            self.count += 1
            self.row[slot], self.start[slot], self.first[slot] = row, start, self.end
            self.sampled[slot], self.last[slot] = 0, -1 if prompt else self.end - 1
            self._mask.tensor[slot, self.base : self.end] = False
            if prompt:
                self._mask.tensor[slot, start : self.end] = True
                self._ids.tensor[slot, start : self.end] = torch.tensor(prompt)
            for cache in self.caches:
                cache.ready[slot] = False
        self.base = int(self.start[: self.count].min())

    def append(self, tokens: torch.Tensor, ends: np.ndarray) -> None:
        """Append a column with the next token of each row that has not finished; finished rows get padding.

        Args:
            tokens (`torch.Tensor` of shape `(count,)`): tokens.
            ends (`np.ndarray` of shape `(count,)`, bool): whether the row finishes with its token.
        """
        real = self.unfinished
        self.reserve(1)
        self._ids.tensor[: self.count, self.end] = tokens
        self._mask.tensor[: self.count, self.end] = torch.from_numpy(real).to(tokens.device)
        self.sampled[: self.count][real] += 1
        self.last[: self.count][real & ends] = self.end
        self.end += 1

    def release(self, slots: np.ndarray) -> None:
        """Free slots; the last rows move into them, so that the slots in use stay the first ones."""
        for slot in sorted(slots.tolist(), reverse=True):
            self.count -= 1
            if slot != self.count:
                for values in (self.row, self.start, self.first, self.sampled, self.last):
                    values[slot] = values[self.count]
                for buffer in (self._ids, self._mask):
                    buffer.copy_row(self.count, slot, self.base, self.end)
                for cache in self.caches:
                    cache.copy_row(self.count, slot)
        if self.count:
            self.base = int(self.start[: self.count].min())

    def tokens(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampled tokens `(T,)` of a finished row, and the columns `(T,)` before them."""
        columns = self._mask.tensor[slot, self.first[slot] - 1 : self.last[slot] + 1].nonzero().squeeze(1)
        columns += int(self.first[slot]) - 1
        return self._ids.tensor[slot, columns[1:]], columns[:-1]

    @property
    def holes(self) -> np.ndarray:
        """Columns of each unfinished row, after its first token, that hold none of its tokens, `(count,)`."""
        return self.end - self.first[: self.count] - self.sampled[: self.count]

    def replace(self, slot: int, column: int, token: int, sampled: int, finishes: bool, end: int) -> None:
        """Replace a row's token in `column`, and drop its later ones.

        The newest token of a row that continues moves to the last column, so that all rows continue from there.

        Args:
            slot (`int`): the row's slot.
            column (`int`): column of the replaced token.
            token (`int`): the new token.
            sampled (`int`): number of tokens of the row, with this one.
            finishes (`bool`): whether it is the row's last one.
            end (`int`): end of the columns that [`cut`] will keep.
        """
        self._mask.tensor[slot, column:end] = False
        column = column if finishes else end - 1
        self._ids.tensor[slot, column] = token
        self._mask.tensor[slot, column] = True
        self.sampled[slot], self.last[slot] = sampled, column if finishes else -1

    def cut(self, end: int) -> None:
        """Drop the columns from `end` on; the caches read the last remaining one again."""
        self.end = end
        for cache in self.caches:
            cache.fed = min(cache.fed, end - 1)

    def align(self) -> None:
        """Remove the columns within rows that hold none of their tokens; the tokens before move towards the end.

        All rows have a token in the newest column, and all caches have read the columns before.
        """
        columns = self.mask.long().argsort(dim=1, stable=True)  # those without a token first
        for buffer in (self._ids, self._mask):
            buffer.gather(columns, self.base)
        for cache in self.caches:
            cache.gather(columns[:, :-1], self.base)
        self.start[: self.count] += self.holes
        self.first[: self.count] = self.end - self.sampled[: self.count]
        self.base = int(self.start[: self.count].min())

    def reserve(self, columns: int) -> None:
        """Make room for further columns; this can change the numbers of all columns."""
        if self.end + columns <= self.columns:
            return
        base, needed = self.base, self.end - self.base + columns
        larger = max(2 * self.columns, needed + _FIRST_COLUMNS)
        if self._limit is not None:
            larger = max(min(larger, self._limit), needed)
        if base <= _DEAD_SHARE * self.columns or needed > self.columns:
            self.columns = max(self.columns, larger)
        for buffer in (self._ids, self._mask):
            buffer.move(base, min(self.end, buffer.tensor.shape[1]), self.columns)
        for cache in self.caches:
            cache.move(base)
        self.start -= base
        self.first -= base
        self.last[self.last >= 0] -= base
        self.end -= base
        self.base = 0


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, for all columns of the rows in slots.

    Layers with a sliding window keep all columns too: their attention mask leaves out those before the window.
    """

    is_sliding = False

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self._cache: SlotCache = weakref.proxy(cache)
        self.buffers: list[Buffer] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        slots = self._cache.slots
        self.buffers = [Buffer(states, slots.size, slots.columns, dim=2) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states of new columns, and return those of all columns that these may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, length, _ = key_states.shape
        start = self._cache.start
        new = key_states, value_states
        if self._cache.prompts_of is not None:
            numbers = torch.from_numpy(self._cache.prompts_of).to(key_states.device)
            for buffer, states in zip(self.buffers, new, strict=True):
                buffer.tensor[numbers, :, start : start + length] = states
            return new
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer.view(rows, start, start + length).copy_(states)
        keys, values = (buffer.view(rows, self._cache.slots.base, start + length) for buffer in self.buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._cache.prompts_of is not None else self._cache.start - self._cache.slots.base

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The KV cache of one model for the rows in slots, and the model's last hidden states if they are kept.

    Args:
        config (`PreTrainedConfig`): the model's configuration.
        slots ([`Slots`]): the rows.

    Attributes:
        fed (`int`): the model has read the columns before this one, of the rows that are `ready`.
        ready (`np.ndarray` of shape `(S,)`, bool): rows whose columns before `fed` are in the cache.
        start (`int`): column from which on the model reads in a forward pass.
        prompts_of (`np.ndarray`, *optional*): slots of a forward pass over new prompts alone; None for all rows.
    """

    def __init__(self, config: PreTrainedConfig, slots: Slots):
        self.slots = slots
        self.fed = self.start = 0
        self.prompts_of: np.ndarray | None = None
        self.ready = np.zeros(slots.size, dtype=bool)
        self._states: Buffer | None = None
        self._width = config.get_text_config().hidden_size
        layers = DynamicCache(config=config).layers
        self.has_windows = any(getattr(layer, "is_sliding", False) for layer in layers)
        self._layers = [SlotLayer(self) for _ in layers]
        super().__init__(layers=list(self._layers))
        slots.caches.add(self)

    def keep_states(self, hidden_states: torch.Tensor) -> None:
        """Keep the hidden states `(count, n, H)` of the last n columns before `fed`."""
        if self._states is None:
            self._states = Buffer(hidden_states, self.slots.size, self.slots.columns, dim=1)
        rows, length, _ = hidden_states.shape
        self._states.view(rows, self.fed - length, self.fed).copy_(hidden_states)

    def states(self, slots: torch.Tensor | int, columns: torch.Tensor) -> torch.Tensor:
        """Return the kept hidden states `(n, H)` at these columns `(n,)` of one slot, or of slots `(n,)`."""
        if self._states is None:  # no row has had a prompt, so the model has not run
            assert not len(columns), "this cache keeps no states"
            return torch.zeros(0, self._width, device=columns.device)
        device = self._states.tensor.device
        slots = slots.to(device) if isinstance(slots, torch.Tensor) else slots
        return self._states.tensor[slots, columns.to(device)]

    def copy_row(self, source: int, target: int) -> None:
        """Copy the columns of a slot to another one."""
        self.ready[target] = self.ready[source]
        if self.ready[source] and self.fed > self.slots.base:
            for buffer in self._buffers():
                buffer.copy_row(source, target, self.slots.base, self.fed)

    def gather(self, columns: torch.Tensor, start: int) -> None:
        """Replace the columns from `start` on as the slots do, see [`Buffer.gather`]."""
        for buffer in self._buffers():
            buffer.gather(columns, start)

    def move(self, base: int) -> None:
        """Follow the slots, which move their columns to the front from `base` on."""
        for buffer in self._buffers():
            buffer.move(min(base, self.fed), self.fed, self.slots.columns)
        self.fed = max(self.fed - base, 0)

    def _buffers(self) -> list[Buffer]:
        states = [] if self._states is None else [self._states]
        return [buffer for layer in self._layers for buffer in layer.buffers] + states
