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
from ..models.lm_head import LMHead, accepts_position_ids, position_ids, rounding_tolerance, without_wrapper

logger = logging.get_logger(__name__)

_NUMBERS = itertools.count()  # of compiled functions

# Finished rows are evicted from the caches once they make up more than this share: evicting copies the caches.
_DROP_SHARE = 0.25

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
        batch_size (`int`): rows to decode; `rows` has the numbers of those that are still in the cache.
        keep_from (`int`, *optional*): first index in `ids` whose hidden state is kept.
        compiled ([`CompiledDecoding`], *optional*): runs the steps of `model` compiled, with room for `length` tokens;
            finished rows are not evicted then.
        length (`int`, *optional*, defaults to `0`): tokens of a whole sequence, needed with `compiled`.
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
        """Return logits of the token after `ids` for `rows`, `(B, L) -> (R, V)`; `mask` is False on left padding."""
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
            # a copy, as a view would keep the states of the whole prompt in memory
            self.states.append((self.rows, first, hidden_states[:, first - start :].clone()))
        assert self.head is not None  # made wherever hidden states are read
        return self.head.logits(hidden_states[:, -1], self.vocab_size).to(ids.device)

    def drop(self, finished: np.ndarray, last: np.ndarray) -> None:
        """Evict finished rows from the cache, once there are enough of them.

        Args:
            finished (`np.ndarray` of shape `(B,)`, bool): rows that have ended.
            last (`np.ndarray` of shape `(B,)`): index in `ids` of each row's last token. If hidden states are kept, a
                row stays until the states that predict all of its tokens are computed.
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
        """Return the hidden states of `length` positions from `keep_from`, `(B, length, H)`; 0 in evicted rows."""
        assert self.keep_from is not None, "this decoder keeps no states"
        _, _, newest = self.states[-1]
        states = newest.new_zeros(batch_size, length, newest.shape[-1])
        for rows, start, part in self.states:
            first = start - self.keep_from
            part = part[:, : max(length - first, 0)]  # other processes may have continued for longer
            states[torch.from_numpy(rows).to(states.device), first : first + part.shape[1]] = part
        return states


@torch.no_grad()
def check_decoding(model: PreTrainedModel, name: str, compiled: CompiledDecoding | None = None) -> None:
    """Check on a short input that `model` can decode several tokens at a time, and evict rows from its cache.

    Raises:
        ValueError: if its cache has recurrent layers, which take one token at a time, or if its logits differ from
            a plain forward pass. Sampling from such a model would be silently wrong.
    """
    advice = "Sample without this decode loop (use_vllm=True with teacher_mixed_alpha=0.0, or a rollout_func)."
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers):
        raise UserError(
            f"The {name} ({type(model).__name__}) has recurrent layers, which cannot take several tokens at a time "
            f"as teacher-mixed sampling does. {advice}"
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
    # several roundings, as caches and left padding change the rounding in every layer
    if not error <= rounding_tolerance(expected.dtype, roundings=12) * max(1.0, expected.abs().max().item()):
        raise UserError(
            f"The {name} ({type(model).__name__}) cannot decode several tokens at a time: its logits differ by up to "
            f"{error:.2g} from a plain forward pass. {advice}"
        )
