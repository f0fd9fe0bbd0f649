"""Decoding with a KV cache: a few tokens at a time, and on demand compiled."""

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import logging

from ..errors import UserError
from ..models.lm_head import LMHead, accepts_position_ids, position_ids, rounding_tolerance, without_wrapper

logger = logging.get_logger(__name__)

_NUMBERS = itertools.count()  # of compiled functions

# Rows are dropped from the caches once this share of them has finished: dropping copies the caches.
_DROP_SHARE = 0.25

# Caches have a power of two of positions, at least _SHORTEST, and up to _MOST_SPARE_ROWS times the rows of a batch:
# each shape is compiled, or recorded as a CUDA graph, once more.
_SHORTEST = 128
_MOST_SPARE_ROWS = 2

# A cache, with what was compiled for it, is freed when this many batches have passed without it.
_IDLE_BATCHES = 100

# A call of more tokens (the prompt, or a long run of the other model's tokens) is not compiled. The student is fed
# more at once only after four tokens of the teacher in a row, with a probability of alpha^4.
_MOST_TOKENS = 4


class CompiledDecoding:
    """Runs a model's body over a few tokens at a time, compiled, and keeps its static caches from batch to batch.

    A decoding step of a small model may take longer to launch than to compute. CUDA graphs launch it at once, for
    which tensors have to stay where they are: the cache has room for all tokens from the start, finished rows stay.

    A cache has a power of two of positions, and batches of down to half its rows share it, so there are few. For each
    up to four numbers of tokens are compiled. Caches that are not used any more are freed. Steps that run without
    having been compiled are counted, and there is a warning at the first.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that decodes, not wrapped, in eval mode.
        backend (`str`): of `torch.compile`: `"inductor"` (generates kernels, with CUDA graphs on a GPU; needs Triton
            there and a C++ compiler on a CPU) or `"cudagraphs"` (CUDA graphs alone, without Triton).
    """

    def __init__(self, model: PreTrainedModel, backend: str):
        self.model = model
        self._counts = [0, 0]  # of steps that have run compiled, and of all that should have
        self._has_warned = False
        self._backend = backend
        self._caches: dict[tuple[int, int], StaticCache] = {}  # by rows and length
        self._functions: dict[tuple[int, int], Callable] = {}
        self._used: dict[tuple[int, int], int] = {}  # the last batch of each
        self._batches = 0
        self._shape = (0, 0)  # of the cache in use

    def start(self, batch_size: int, length: int) -> StaticCache:
        """An empty cache for `batch_size` rows of at most `length` tokens."""
        length = max(_SHORTEST, 1 << (length - 1).bit_length())
        fitting = [rows for rows, _ in self._caches if batch_size <= rows <= _MOST_SPARE_ROWS * batch_size]
        self._shape = max(fitting, default=batch_size), length
        self._batches += 1
        self._used[self._shape] = self._batches
        for idle in [shape for shape, batch in self._used.items() if self._batches - batch > _IDLE_BATCHES]:
            for kept in (self._caches, self._functions, self._used):
                del kept[idle]
        if self._shape not in self._caches:
            self._caches[self._shape] = StaticCache(config=self.model.config, max_cache_len=length)
            self._functions[self._shape] = self._compile()
        self._caches[self._shape].reset()
        return self._caches[self._shape]

    def _compile(self) -> Callable[..., tuple[torch.Tensor, bool]]:
        """The body, compiled: returns last hidden states, and whether they have been computed by what was compiled."""
        body = self.model.base_model

        def step(**inputs: Any) -> tuple[torch.Tensor, bool]:
            return body(**inputs, use_cache=True).last_hidden_state, torch.compiler.is_compiling()

        # dynamo keeps what it compiles, and counts recompilations, by code object: with one of its own, neither is
        # shared with other shapes or models, and all of it is freed with the function
        code = step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
        own = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
        options = {"mode": "reduce-overhead"} if self._backend == "inductor" else {}
        return torch.compile(own, backend=self._backend, dynamic=False, **options)

    def hidden_states(self, inputs: dict[str, Any], is_prompt: bool) -> torch.Tensor:
        """Last hidden states of `inputs`; rows and attention mask are filled up to the shape of the cache."""
        num_rows, (rows, length) = len(inputs["input_ids"]), self._shape
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        tensors["attention_mask"] = pad(tensors["attention_mask"], (0, length - tensors["attention_mask"].shape[1]))
        repeated = torch.arange(rows, device=tensors["input_ids"].device).clamp(max=num_rows - 1)
        # strides are part of what is compiled
        inputs = {**inputs, **{name: value[repeated].contiguous() for name, value in tensors.items()}}
        if is_prompt or inputs["input_ids"].shape[1] > _MOST_TOKENS:
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
            f"A decoding step over a cache of {self._shape[0]} rows and {self._shape[1]} positions runs without "
            "having been compiled: torch.compile has reached its limit of recompilations. See the metric "
            'rollout/compiled_steps for how many do; TORCH_LOGS="recompiles" names the reasons.'
        )

    def take_counts(self) -> tuple[int, int]:
        """Numbers of decoding steps since the last call: those that have run compiled, and all that should have."""
        counts, self._counts = tuple(self._counts), [0, 0]
        return counts


class LazyDecoder:
    """A model with its KV cache that is fed the tokens since its last call only when its logits are wanted.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        vocab_size (`int`): number of leading vocabulary rows to return logits of.
        batch_size (`int`): rows to decode; finished ones are dropped from `rows`.
        keep_from (`int`, *optional*): index in `ids` from which on hidden states are kept.
        compiled ([`CompiledDecoding`], *optional*): of `model`, with room for `length` tokens; no row is dropped then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        batch_size: int,
        keep_from: int | None = None,
        compiled: CompiledDecoding | None = None,
        length: int = 0,
    ):
        self.model = model = without_wrapper(model)
        self.vocab_size = vocab_size
        self.compiled = compiled
        self.cache = DynamicCache(config=model.config) if compiled is None else compiled.start(batch_size, length)
        self.fed = 0
        self.rows = np.arange(batch_size)
        self.keep_from = keep_from
        self.states: list[tuple[np.ndarray, int, torch.Tensor]] = []  # rows, index of the first position, states
        self.takes_positions = accepts_position_ids(model)
        self.head = None if compiled is None and keep_from is None else LMHead.of(model)

    def next_logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of the token after `ids` for `rows`, `(B, L) -> (R, V)`; `mask` is False on left padding."""
        if len(self.rows) < len(ids):
            rows = torch.from_numpy(self.rows).to(ids.device)
            ids, mask = ids[rows], mask[rows]
        inputs = {"input_ids": ids[:, self.fed :], "attention_mask": mask.long(), "past_key_values": self.cache}
        if self.takes_positions:
            inputs["position_ids"] = position_ids(mask)[:, self.fed :]
        start, self.fed = self.fed, ids.shape[1]
        if self.compiled is not None:
            hidden_states = self.compiled.hidden_states(inputs, is_prompt=start == 0)
        elif self.keep_from is not None:
            hidden_states = self.model.base_model(**inputs, use_cache=True).last_hidden_state
        else:
            logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1, : self.vocab_size]
            return logits.to(ids.device)
        if self.keep_from is not None:
            first = max(start, self.keep_from)
            self.states.append((self.rows, first, hidden_states[:, first - start :].clone()))  # no view of more
        return self.head.logits(hidden_states[:, -1], self.vocab_size).to(ids.device)

    def drop(self, finished: np.ndarray, last: np.ndarray) -> None:
        """Drop finished rows, once enough of them have finished; `last` is the index of their last token in `ids`.

        Where states are kept, a row stays until the states that predict its tokens are there.
        """
        if self.compiled is not None:
            return
        droppable = finished[self.rows]
        if self.keep_from is not None:
            droppable = droppable & (last[self.rows] <= self.fed)
        if droppable.all() or droppable.mean() <= _DROP_SHARE:
            return
        keep = np.flatnonzero(~droppable)
        if self.fed:
            self.cache.batch_select_indices(torch.from_numpy(keep).to(self.model.device))
        self.rows = self.rows[keep]

    def kept_states(self, batch_size: int, length: int) -> torch.Tensor:
        """Hidden states of `length` positions from `keep_from` on, `(B, length, H)`; 0 where a row was dropped."""
        _, _, newest = self.states[-1]
        states = newest.new_zeros(batch_size, length, newest.shape[-1])
        for rows, start, part in self.states:
            first = start - self.keep_from
            part = part[:, : max(length - first, 0)]  # other processes may have gone on for longer
            states[torch.from_numpy(rows).to(states.device), first : first + part.shape[1]] = part
        return states


@torch.no_grad()
def check_decoding(model: PreTrainedModel, name: str, compiled: CompiledDecoding | None = None) -> None:
    """Check on a short input that `model` can be fed several tokens at a time, and rows dropped from its cache.

    Raises:
        ValueError: if its cache has recurrent layers, which take one token at a time, or its logits differ from those
            of a plain forward pass. Sampling from such a model would be silently wrong.
    """
    advice = "Sample without this decode loop (use_vllm=True with teacher_mixed_alpha=0.0, or a rollout_func)."
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers):
        raise UserError(
            f"The {name} ({type(model).__name__}) has recurrent layers, whose state cannot be fed a few tokens at a "
            f"time as teacher-mixed sampling does. {advice}"
        )
    vocab_size = model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(1, 25, device=model.device).view(2, 12) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False  # left padding
    decoder = LazyDecoder(model, vocab_size, len(ids), compiled=compiled, length=ids.shape[1])
    for fed, finished in ((5, [False, False]), (8, [False, False]), (9, [False, True]), (12, [False, True])):
        decoder.drop(np.array(finished), np.zeros(2))
        logits = decoder.next_logits(ids[:, :fed], mask[:, :fed])
    expected = model(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:].long(), use_cache=False).logits[:, -1]
    error = (logits[:1].float() - expected.float()).abs().max().item()
    # several, as caches and left padding round otherwise in every layer
    if not error <= rounding_tolerance(expected.dtype, roundings=12) * max(1.0, expected.abs().max().item()):
        raise UserError(
            f"The {name} ({type(model).__name__}) cannot be decoded a few tokens at a time: logits differ by up to "
            f"{error:.2g} from those of a plain forward pass. {advice}"
        )
