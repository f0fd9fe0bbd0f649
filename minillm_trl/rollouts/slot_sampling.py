"""The loop that decodes prompts in slots: a row that finishes gives its slot to the next prompt."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .decoding import LazyDecoder
from .draws import draw_tokens
from .ngram_block import NgramBlock
from .slots import Slots


class FinishedRow(NamedTuple):
    """A completion that has left its slot.

    Attributes:
        row (`int`): number of its prompt.
        tokens (`torch.Tensor` of shape `(T,)`): the completion.
        states (`list[torch.Tensor]`): for each decoder, the hidden states `(T, H)` that predict the tokens, if kept.
    """

    row: int
    tokens: torch.Tensor
    states: list[torch.Tensor]


@dataclass
class SlotSampling:
    """Decode prompts in slots, with a token for each row at each step.

    Args:
        decoders (`list[LazyDecoder]`): of the student and, with coins, of the teacher.
        slots ([`Slots`]): the slots of both.
        prompts (`Sequence[Sequence[int]]`): token ids; unless all of them fit into the slots, the longest come first.
        max_new_tokens (`int`): length limit N.
        eos_token_ids (`Sequence[int]`): ids that end a row.
        pad_token_id (`int`): token of rows that have finished.
        uniforms (`np.ndarray` of shape `(R, N)`, *optional*): the number that draws each token; None decodes greedily.
        temperature (`float`): of both models.
        coins (`Callable`, *optional*): maps the rows in the slots, the numbers of tokens that they have sampled, and
            the number of the step to coins `(count,)` or `(1,)`: True where the teacher draws.
        block ([`NgramBlock`], *optional*): n-grams that no row repeats.
        on_every_process (`Callable`, *optional*): see [`~minillm_trl.rollouts.sampling.sample_completions`]. Only a
            process whose prompts all fit into the slots can take part.
    """

    decoders: list[LazyDecoder]
    slots: Slots
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    pad_token_id: int
    uniforms: np.ndarray | None
    temperature: float
    coins: Callable[[np.ndarray, np.ndarray, int], np.ndarray] | None = None
    block: NgramBlock | None = None
    on_every_process: Callable[[bool], bool] | None = None
    _waiting: deque[int] = field(init=False)
    _step: int = 0

    def __post_init__(self) -> None:
        self._waiting = deque(range(len(self.prompts)))

    def run(self) -> Iterator[FinishedRow]:
        """Yield each row when it leaves its slot."""
        self._refill()
        while not self._everywhere(not (self.slots.unfinished.any() or self._waiting)):
            if self.slots.unfinished.any() or self.on_every_process is not None:
                self._draw_step()
            else:  # only rows whose hidden states are incomplete, and prompts that wait for their slots
                self._complete_states()
            yield from self._release()
            self._refill()
        self._complete_states()
        yield from self._take(np.arange(self.slots.count))

    def _everywhere(self, flag: bool) -> bool:
        return flag if self.on_every_process is None else self.on_every_process(flag)

    def _refill(self) -> None:
        free = min(self.slots.size - self.slots.count, len(self._waiting))
        if free:
            rows = [self._waiting.popleft() for _ in range(free)]
            self.slots.admit(rows, [self.prompts[row] for row in rows])

    def _draw_step(self) -> None:
        """Draw the next token of each row."""
        slots = self.slots
        unfinished, rows = slots.unfinished, slots.row[: slots.count].copy()
        coins = np.array([False])
        if self.coins is not None:
            steps = np.minimum(slots.sampled[: slots.count], self.max_new_tokens - 1)
            coins = self.coins(rows, steps, self._step)
        tokens = torch.full((slots.count,), self.pad_token_id, device=slots.ids.device)
        for decoder, chosen in zip(self.decoders, (~coins, coins), strict=False):
            wanted = np.flatnonzero(chosen & unfinished)
            # either all processes call a sharded model, or none
            if self._everywhere(not len(wanted)) if self.coins is not None else not len(wanted):
                continue
            if not len(wanted):
                decoder.feed()
                continue
            tokens[torch.from_numpy(wanted).to(tokens.device)] = self._draw(decoder, wanted)
        if self.block is not None:
            self.block.append(rows[unfinished].tolist(), tokens[torch.from_numpy(unfinished)].tolist())
        self.append(tokens)
        self._step += 1

    def _draw(self, decoder: LazyDecoder, wanted: np.ndarray) -> torch.Tensor:
        """Return the next tokens of the slots `wanted`, drawn from the decoder's model."""
        logits = decoder.next_logits(wanted)
        rows = self.slots.row[wanted]
        if self.block is not None:
            logits = self.block.exclude(logits, rows.tolist())
        return draw_tokens(logits, self.numbers(self.uniforms, wanted), self.temperature)

    def numbers(self, uniforms: np.ndarray | None, wanted: np.ndarray) -> torch.Tensor | None:
        """Return the number of the next token of each of the slots `wanted`."""
        if uniforms is None:
            return None
        numbers = uniforms[self.slots.row[wanted], self.slots.sampled[wanted]]
        return torch.from_numpy(numbers).to(self.slots.ids.device)

    def append(self, tokens: torch.Tensor) -> None:
        """Append a token for each row, and finish the rows that end with it."""
        slots = self.slots
        ends = np.isin(tokens.cpu().numpy(), self.eos_token_ids)
        slots.append(tokens, ends | (slots.sampled[: slots.count] + 1 == self.max_new_tokens))

    def _release(self) -> Iterator[FinishedRow]:
        """Yield the rows that have finished, once the hidden states that predict all of their tokens are known."""
        slots = self.slots
        last = slots.last[: slots.count]
        ready = ~slots.unfinished
        for decoder in self.decoders:
            if decoder.keeps_states:
                ready &= last <= decoder.cache.fed
        if self.on_every_process is not None and ready.all():
            ready[0] = False  # other processes may need this one's calls
        yield from self._take(np.flatnonzero(ready))

    def _take(self, released: np.ndarray) -> Iterator[FinishedRow]:
        slots = self.slots
        for slot in released:
            tokens, columns = slots.tokens(slot)
            states = [decoder.cache.states(slot, columns) for decoder in self.decoders if decoder.keeps_states]
            yield FinishedRow(int(slots.row[slot]), tokens, states)
        slots.release(released)

    def _complete_states(self) -> None:
        """Let each decoder that keeps states read the columns that predict tokens and that it has not read."""
        if not self.slots.count:
            return
        last = int(self.slots.last[: self.slots.count].max())
        for decoder in self.decoders:
            if not decoder.keeps_states:
                continue
            # processes cannot know whether another one needs the call, so with a sharded model all make it
            if self.on_every_process is not None:
                decoder.feed()
            elif last > decoder.cache.fed:
                decoder.feed(last)
