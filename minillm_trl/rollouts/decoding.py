"""Decoding with a KV cache, several tokens at a time."""

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..errors import UserError
from ..models.attention import grouped_attention
from ..models.lm_head import (
    LMHead,
    accepts_position_ids,
    cache_argument,
    position_ids,
    rounding_tolerance,
    without_wrapper,
)
from .slots import SlotCache, Slots


class LazyDecoder:
    """Decode with a KV cache, deferring the forward pass: tokens queue until logits are requested.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        vocab_size (`int`): number of leading vocabulary rows to return logits of.
        slots ([`Slots`]): the rows to decode.
        keep_states (`bool`, *optional*, defaults to `False`): whether to keep the hidden states of all tokens.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, slots: Slots, keep_states: bool = False):
        self.model = model = without_wrapper(model)
        self.vocab_size = vocab_size
        self.slots = slots
        self.cache = SlotCache(model.config, slots)
        self.keeps_states = keep_states
        self.takes_positions = accepts_position_ids(model)
        self._cache_argument = cache_argument(model)
        self._head = LMHead.of(model) if keep_states else None

    def next_logits(self, wanted: np.ndarray) -> torch.Tensor:
        """Return logits of the token after the newest column for the slots `wanted` `(R,)`, `(R, V)`."""
        hidden_states, logits = self._feed()
        numbers = torch.from_numpy(wanted)
        if logits is None:
            assert self._head is not None  # made wherever hidden states are read
            logits = self._head.logits(hidden_states[numbers.to(hidden_states.device), -1], self.vocab_size)
        else:
            logits = logits[numbers.to(logits.device), -1, : self.vocab_size]
        return logits.to(self.slots.ids.device)

    def feed(self, end: int | None = None) -> None:
        """Read all columns up to the newest one, or those before `end`."""
        self._feed(end)

    def logits_at(self, slots: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        """Return the logits `(K, V)` of the tokens after these columns `(K,)` of slots `(K,)`, from kept states."""
        assert self._head is not None  # made where states are kept
        states = self.cache.states(torch.from_numpy(slots), torch.from_numpy(columns))
        return self._head.logits(states, self.vocab_size).to(self.slots.ids.device)

    def _feed(self, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the last hidden states of the new columns, or else the logits of the newest one."""
        self._read_prompts()
        slots, cache = self.slots, self.cache
        cache.start = cache.fed
        end = slots.end if end is None else end
        columns = slice(end - slots.base)
        inputs = self._inputs(slots.ids[:, columns], slots.mask[:, columns], cache.fed - slots.base)
        cache.fed = end
        if self._head is None:
            logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits
            return logits, logits
        hidden_states = self.model.base_model(**inputs, use_cache=True).last_hidden_state
        cache.keep_states(hidden_states)
        return hidden_states, None

    def _read_prompts(self) -> None:
        """Read the columns of new rows before those that all rows have yet to read."""
        slots, cache = self.slots, self.cache
        new = np.flatnonzero(~cache.ready[: slots.count])
        cache.ready[new] = True
        cache.fed = slots.base if len(new) == slots.count else max(cache.fed, slots.base)
        new = new[slots.start[new] < cache.fed]
        if not len(new):
            return
        cache.start, cache.prompts_of = int(slots.start[new].min()), new
        numbers = torch.from_numpy(new).to(slots.ids.device)
        columns = slice(cache.start - slots.base, cache.fed - slots.base)
        inputs = self._inputs(slots.ids[numbers, columns], slots.mask[numbers, columns], 0)
        if self._head is None:
            self.model(**inputs, use_cache=True, logits_to_keep=1)
        else:
            self.model.base_model(**inputs, use_cache=True)
        cache.prompts_of = None

    def _inputs(self, ids: torch.Tensor, mask: torch.Tensor, start: int) -> dict[str, Any]:
        """Return the inputs of a forward pass over the columns from `start` on."""
        inputs: dict[str, Any] = {"input_ids": ids[:, start:], "attention_mask": mask.long()}
        inputs[self._cache_argument] = self.cache
        if self.takes_positions:
            inputs["position_ids"] = position_ids(mask)[:, start:]
        return inputs


@torch.no_grad()
@grouped_attention()
def check_decoding(model: PreTrainedModel, name: str) -> None:
    """Check on a short input that `model` can decode several tokens at a time, in slots that rows leave and take.

    Raises:
        ValueError: if its cache has layers without a key and a value for each token (recurrent layers take one token
            at a time), or if its logits differ from a plain forward pass. Sampling from such a model would be
            silently wrong.
    """
    advice = "Sample without this decode loop (use_vllm=True with teacher_mixed_alpha=0.0, or a rollout_func)."
    layers = DynamicCache(config=model.config).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UserError(
            f"The {name} ({type(model).__name__}) has recurrent layers, which cannot take several tokens at a time "
            f"as teacher-mixed sampling does. {advice}"
        )
    if others := {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise UserError(f"The {name} ({type(model).__name__}) has cache layers {others}, not plain keys. {advice}")
    ids = torch.arange(1, 27, device=model.device).view(2, 13) % model.config.get_text_config().vocab_size
    logits = _decode_in_slots(model, ids)
    expected = [
        model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], use_cache=False).logits[0, -1]
        for row in (ids[0, 3:], ids[1])
    ]
    for found, plain in zip(logits, expected, strict=True):
        error = (found.float() - plain.float()).abs().max().item()
        # several roundings, as caches and left padding change the rounding in every layer
        if not error <= rounding_tolerance(plain.dtype, roundings=12) * max(1.0, plain.abs().max().item()):
            raise UserError(
                f"The {name} ({type(model).__name__}) cannot decode several tokens at a time: its logits differ by up "
                f"to {error:.2g} from a plain forward pass. {advice}"
            )


def _decode_in_slots(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits `(2, V)` after the rows `ids` `(2, 13)`, the first one without its first three tokens.

    Before, the first slot is freed and taken again, by a prompt that ends where the others are.
    """
    vocab_size = model.get_output_embeddings().weight.shape[0]
    slots = Slots(2, ids.device)
    decoder = LazyDecoder(model, vocab_size, slots)
    rows = [1, 0]  # the longer one first
    slots.admit(rows, [ids[1, :5].tolist(), ids[0, 3:5].tolist()])
    for column in range(5, ids.shape[1]):
        if column in (5, 8, 9, 12):
            decoder.feed()
        if column == 9:
            slots.release(np.array([0]))
            rows = [0, 1]
        if column == 10:
            slots.admit([1], [ids[1, :column].tolist()])
        slots.append(ids[rows[: slots.count], column], np.zeros(slots.count, dtype=bool))
    return decoder.next_logits(np.argsort(rows))
