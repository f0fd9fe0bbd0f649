"""Decoding with a KV cache: several tokens at a time, compiled on request."""

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, StaticLayer, StaticSlidingWindowLayer
from transformers.utils import logging

from ..errors import UserError
from ..models.lm_head import (
    LMHead,
    accepts_position_ids,
    cache_argument,
    position_ids,
    rounding_tolerance,
    without_wrapper,
)
from .slots import SlotCache, Slots

logger = logging.get_logger(__name__)

_NUMBERS = itertools.count()  # of compiled functions

# Each shape of a cache costs a compilation, or a CUDA graph. To keep shapes few, the number of positions is a power of
# two, at least _MIN_LENGTH, and a batch may use a cache with up to _MAX_ROWS_RATIO times its rows.
_MIN_LENGTH = 128
_MAX_ROWS_RATIO = 2

# A cache and its compiled function are freed after this many batches that did not use them.
_IDLE_BATCHES = 100

# Longer inputs run without compilation: the prompt, and the tokens after a long run of the other model. The student
# gets more than four tokens at once only after four teacher tokens in a row, with probability alpha^4.
_MAX_COMPILED_TOKENS = 4


class CompiledDecoding:
    """Run a model's body over a few tokens at a time, compiled, with static caches that batches share.

    Launching a decoding step of a small model can take longer than computing it. A CUDA graph launches the whole step
    at once, but needs all tensors at fixed addresses: the cache has room for all tokens from the start, and finished
    rows stay in it.

    To keep the number of shapes small, a cache has a power of two of positions, and batches of down to half its rows
    use it. Each cache is compiled for one to four new tokens. Caches that are no longer used are freed. Steps that ran
    without compilation are counted, and the first one is logged as a warning.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that decodes, unwrapped, in eval mode.
        backend (`str`): backend of `torch.compile`: `"inductor"` (generates kernels, with CUDA graphs on a GPU; needs
            Triton there, and a C++ compiler on a CPU) or `"cudagraphs"` (CUDA graphs alone, without Triton).
    """

    def __init__(self, model: PreTrainedModel, backend: str):
        self.model = model
        self._counts = [0, 0]  # steps that ran compiled, and all steps that should have
        self._has_warned = False
        self._backend = backend
        self._caches: dict[tuple[int, int], StaticCache] = {}  # by rows and length
        self._functions: dict[tuple[int, int], Callable] = {}
        self._used: dict[tuple[int, int], int] = {}  # number of the last batch that used each shape
        self._batches = 0
        self._shape = (0, 0)  # of the cache in use

    def start(self, batch_size: int, length: int) -> StaticCache:
        """Return an empty cache for `batch_size` rows of at most `length` tokens."""
        length = max(_MIN_LENGTH, 1 << (length - 1).bit_length())
        fitting = [rows for rows, _ in self._caches if batch_size <= rows <= _MAX_ROWS_RATIO * batch_size]
        self._shape = max(fitting, default=batch_size), length
        self._batches += 1
        self._used[self._shape] = self._batches
        for idle in [shape for shape, batch in self._used.items() if self._batches - batch > _IDLE_BATCHES]:
            for kept in (self._caches, self._functions, self._used):
                del kept[idle]
        if self._shape not in self._caches:
            self._caches[self._shape] = static_cache(self.model.config, length)
            self._functions[self._shape] = self._compile()
        self._caches[self._shape].reset()
        return self._caches[self._shape]

    def _compile(self) -> Callable[..., tuple[torch.Tensor, bool]]:
        """Compile the body to a function that returns last hidden states, and whether compiled code computed them."""
        body = self.model.base_model

        def step(**inputs: Any) -> tuple[torch.Tensor, bool]:
            return body(**inputs, use_cache=True).last_hidden_state, torch.compiler.is_compiling()

        # dynamo caches compilations, and limits their number, per code object. A code object for each shape and model
        # keeps their limits separate and frees the compilations with the function.
        code = step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
        own = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
        mode = "reduce-overhead" if self._backend == "inductor" else None
        return torch.compile(own, backend=self._backend, dynamic=False, mode=mode)

    def hidden_states(self, inputs: dict[str, Any], is_prompt: bool) -> torch.Tensor:
        """Return the last hidden states of `inputs`, whose rows and mask are padded to the shape of the cache."""
        num_rows, (rows, length) = len(inputs["input_ids"]), self._shape
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        tensors["attention_mask"] = pad(tensors["attention_mask"], (0, length - tensors["attention_mask"].shape[1]))
        repeated = torch.arange(rows, device=tensors["input_ids"].device).clamp(max=num_rows - 1)
        # contiguous, because a compiled function is specialised on strides
        inputs = {**inputs, **{name: value[repeated].contiguous() for name, value in tensors.items()}}
        if is_prompt or inputs["input_ids"].shape[1] > _MAX_COMPILED_TOKENS:
            return self.model.base_model(**inputs, use_cache=True).last_hidden_state[:num_rows]
        torch.compiler.cudagraph_mark_step_begin()
        hidden_states, is_compiled = self._functions[self._shape](**inputs)
        self._counts[0] += is_compiled
        self._counts[1] += 1
        if not (is_compiled or self._has_warned):
            self._warn_of_eager_step()
        return hidden_states[:num_rows].clone()  # the next step writes to the same memory

    def _warn_of_eager_step(self) -> None:
        self._has_warned = True
        logger.warning(
            f"A decoding step with a cache of {self._shape[0]} rows and {self._shape[1]} positions runs without "
            "compilation: torch.compile has reached its recompilation limit. The metric rollout/compiled_steps has "
            'the share of compiled steps; TORCH_LOGS="recompiles" prints the reasons.'
        )

    def take_counts(self) -> tuple[int, int]:
        """Return the decoding steps since the last call: how many ran compiled, and how many should have."""
        (compiled, total), self._counts = self._counts, [0, 0]
        return compiled, total


def static_cache(config: PreTrainedConfig, length: int) -> StaticCache:
    """Return an empty static cache of `length` positions in every layer, those with a sliding window included.

    transformers' own layer for a window counts tokens in a Python int, for each value of which dynamo recompiles. A
    layer that keeps all positions counts them in a tensor; the attention mask leaves out those before the window.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    cache.layers = [
        StaticLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


class LazyDecoder:
    """Decode with a KV cache, deferring the forward pass: tokens queue until logits are requested.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        vocab_size (`int`): number of leading vocabulary rows to return logits of.
        slots ([`Slots`]): the rows to decode.
        keep_states (`bool`, *optional*, defaults to `False`): whether to keep the hidden states of all tokens.
        compiled ([`CompiledDecoding`], *optional*): runs the steps of `model` compiled, with room for `length` tokens.
            Rows must then stay in their slots.
        length (`int`, *optional*, defaults to `0`): tokens of a whole sequence, needed with `compiled`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        slots: Slots,
        keep_states: bool = False,
        compiled: CompiledDecoding | None = None,
        length: int = 0,
    ):
        self.model = model = without_wrapper(model)
        self.vocab_size = vocab_size
        self.slots = slots
        self.cache = SlotCache(model.config, slots)
        self.compiled = compiled
        self._static = None if compiled is None else compiled.start(slots.size, length)
        self.keeps_states = keep_states
        self.takes_positions = accepts_position_ids(model)
        self._cache_argument = cache_argument(model)
        self._head = LMHead.of(model) if keep_states or compiled is not None else None

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
        cache.fed, is_prompt = end, cache.fed == slots.base
        if self.compiled is not None:
            inputs[self._cache_argument] = self._static
            hidden_states = self.compiled.hidden_states(inputs, is_prompt)
        elif self._head is None:
            logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits
            return logits, logits
        else:
            hidden_states = self.model.base_model(**inputs, use_cache=True).last_hidden_state
        if self.keeps_states:
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
def check_decoding(model: PreTrainedModel, name: str, compiled: CompiledDecoding | None = None) -> None:
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
    logits = _decode_in_slots(model, ids, compiled)
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


def _decode_in_slots(model: PreTrainedModel, ids: torch.Tensor, compiled: CompiledDecoding | None) -> torch.Tensor:
    """Return the logits `(2, V)` after the rows `ids` `(2, 13)`, the first one without its first three tokens.

    Before, unless compiled, the first slot is freed and taken again, by a prompt that ends where the others are.
    """
    vocab_size = model.get_output_embeddings().weight.shape[0]
    slots = Slots(2, ids.device)
    decoder = LazyDecoder(model, vocab_size, slots, compiled=compiled, length=ids.shape[1])
    rows = [1, 0]  # the longer one first
    slots.admit(rows, [ids[1, :5].tolist(), ids[0, 3:5].tolist()])
    for column in range(5, ids.shape[1]):
        if column in (5, 8, 9, 12):
            decoder.feed()
        if column == 9 and compiled is None:
            slots.release(np.array([0]))
            rows = [0, 1]
        if column == 10 and compiled is None:
            slots.admit([1], [ids[1, :column].tolist()])
        slots.append(ids[rows[: slots.count], column], np.zeros(slots.count, dtype=bool))
    return decoder.next_logits(np.argsort(rows))
