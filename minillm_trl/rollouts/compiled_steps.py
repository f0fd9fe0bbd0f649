"""Decoding steps as single graphs: body, head, draw and end test, over tensors whose addresses do not change."""

import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from ..models.lm_head import LMHead, accepts_position_ids, cache_argument, without_wrapper
from .draws import draw_tokens

logger = logging.get_logger(__name__)

_NUMBERS = itertools.count()  # of compiled functions

# Each shape costs compilations, and CUDA graphs. To keep shapes few, the number of columns is a power of two, at least
# _MIN_LENGTH, and a batch may use tensors with up to _MAX_ROWS_RATIO times its rows.
_MIN_LENGTH = 128
_MAX_ROWS_RATIO = 2

# The tensors and the compiled functions of a shape are freed after this many batches that did not use them.
_IDLE_BATCHES = 100

# Columns that a compiled step can read. For numbers in between, the next larger step reads some columns again, which
# takes little on a GPU; each width takes a compilation. More columns run without: the prompt, and what follows a very
# long run of the other model.
WIDTHS = (1, 4, 16)


class StepPlan(NamedTuple):
    """What a step does, apart from the numbers in its tensors; each plan is compiled once for each shape.

    Attributes:
        width (`int`): columns to read, the newest ones.
        overrides (`bool`): whether the drawn token replaces an earlier one of the step only where a coin says so.
        appends (`bool`): whether the step is complete, so that its tokens are appended.
        is_greedy (`bool`): whether the most likely token is taken.
        keeps_states (`bool`): whether the hidden states are kept.
        vocab_size (`int`): number of leading vocabulary rows that may be drawn.
        eos_token_ids (`tuple[int, ...]`): ids that end a row.
        pad_token_id (`int`): token of rows that have finished.
    """

    width: int
    overrides: bool
    appends: bool
    is_greedy: bool
    keeps_states: bool
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


class StepTensors:
    """What steps read and write. CUDA graphs need all of it at the addresses that they were recorded with.

    All prompts end in the same column. Later columns count as unmasked: causality hides them until they are written.

    Args:
        rows (`int`), columns (`int`): the shape.
        device (`torch.device`): device of the tensors.

    Attributes:
        ids, positions, mask (`torch.Tensor` of shape `(R, L)`): tokens, their positions, and where they are real.
        uniforms, coins (`torch.Tensor` of shape `(R, L)`): numbers and coins of the first to the last sampled token.
        drawn (`torch.Tensor` of shape `(R,)`): tokens of the step in progress.
        unfinished, lengths (`torch.Tensor` of shape `(R,)`): rows without an end, and their sampled tokens.
        end, step (`torch.Tensor`, scalars): the next column, and the number of the step.
        temperature (`torch.Tensor`, scalar): divides the logits.
    """

    def __init__(self, rows: int, columns: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return at_fixed_address(torch.zeros(shape, dtype=dtype, device=device))

        self.ids, self.positions, self.mask = (zeros(rows, columns) for _ in range(3))
        self.uniforms = zeros(rows, columns, dtype=torch.float64)
        self.coins = zeros(rows, columns, dtype=torch.bool)
        self.drawn, self.lengths = zeros(rows), zeros(rows)
        self.unfinished = zeros(rows, dtype=torch.bool)
        self.end, self.step = zeros(), zeros()
        self.temperature = zeros(dtype=torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.ids.shape
        return rows, columns

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: np.ndarray | None,
        coins: np.ndarray | None,
        temperature: float,
    ) -> int:
        """Write a batch of prompts, and return the first column after them.

        A row without a prompt has finished; rows beyond the prompts have too.
        """
        first = first_column(prompts)
        self.mask.fill_(1)
        self.mask[:, :first] = 0
        self.ids.zero_()
        for row, prompt in enumerate([*prompts, *[prompts[0]] * (len(self.ids) - len(prompts))]):
            start = first - max(1, len(prompt))  # attention needs a token
            self.mask[row, start:first] = 1
            self.ids[row, first - len(prompt) : first] = torch.tensor(prompt, dtype=torch.long)
        self.positions.copy_((self.mask.cumsum(dim=1) - 1).clamp(min=0))
        self.unfinished.fill_(False)
        self.unfinished[: len(prompts)] = torch.tensor([bool(prompt) for prompt in prompts])
        for tensor, values in ((self.uniforms, uniforms), (self.coins, coins)):
            tensor.zero_()
            if values is not None:
                tensor[: len(values) if len(values) > 1 else None, : values.shape[1]] = torch.from_numpy(values).to(
                    tensor.device
                )
        for scalar, value in ((self.lengths, 0), (self.step, 0), (self.end, first), (self.temperature, temperature)):
            scalar.fill_(value)
        return first

    def append(self, plan: StepPlan) -> None:
        """Append the drawn tokens, and finish the rows that end with them."""
        tokens = torch.where(self.unfinished, self.drawn, plan.pad_token_id)
        self.ids.index_copy_(1, self.end[None], tokens[:, None])
        self.lengths.add_(self.unfinished)
        for end in plan.eos_token_ids:
            self.unfinished.logical_and_(tokens != end)
        self.end.add_(1)
        self.step.add_(1)


def static_columns(length: int) -> int:
    """Return the columns of the tensors for rows of at most `length` tokens."""
    return max(_MIN_LENGTH, 1 << (length - 1).bit_length())


def first_column(prompts: Sequence[Sequence[int]]) -> int:
    """Return the column after the prompts, before which the widest step finds all of its columns."""
    return max(*map(len, prompts), WIDTHS[-1])


def at_fixed_address(tensor: torch.Tensor) -> torch.Tensor:
    """Tell the compiler that a tensor stays where it is, so that CUDA graphs may write to it."""
    import torch._dynamo  # takes a second

    torch._dynamo.mark_static_address(tensor)
    return tensor


class StaticLayer(CacheLayerMixin):
    """Keys and values of one layer for all columns; a position, which all layers share, says where new ones go.

    Layers with a sliding window keep all columns too: their attention mask leaves out those before the window.
    """

    is_sliding = False
    is_compileable = True

    def __init__(self, columns: int, position: torch.Tensor):
        super().__init__()
        self._columns, self._position = columns, position

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate both tensors, like the first states; zeros, as attention multiplies masked values by 0."""
        self.keys, self.values = (
            at_fixed_address(states.new_zeros(*states.shape[:2], self._columns, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states, and return those of all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        # a `device_map` may have put the layer on another device than the embeddings
        columns = torch.arange(key_states.shape[2], device=key_states.device) + self._position.to(key_states.device)
        return self.keys.index_copy_(2, columns, key_states), self.values.index_copy_(2, columns, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns, 0

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]  # a number would be compiled into the code
        return self._position

    def get_max_length(self) -> int:
        return self._columns


class Reader:
    """A model that reads the columns of a batch into a cache of its own, and draws tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, in eval mode.
        tensors ([`StepTensors`]): those of the batch.
        backend (`str`, *optional*): compiles the steps; None runs them as they are.

    Attributes:
        fed (`int`): columns that the model has read.
        counts (`list[int]`): steps that ran compiled, and all steps that should have.
        states (`torch.Tensor` of shape `(R, L, H)`, *optional*): the last hidden states of the columns, if they are
            kept.
    """

    def __init__(self, model: PreTrainedModel, tensors: StepTensors, backend: str | None):
        self.model = without_wrapper(model)
        self.tensors = tensors
        self.fed = 0
        self.counts = [0, 0]
        self.states: torch.Tensor | None = None
        self.head = LMHead.of(self.model)
        embeddings: Any = self.model.get_input_embeddings()
        self._device: torch.device = embeddings.weight.device
        self._position = at_fixed_address(torch.zeros((), dtype=torch.long, device=self._device))
        self._backend = backend
        self._functions: dict[StepPlan, Callable[[], bool]] = {}
        self._cache_argument = cache_argument(self.model)
        self._takes_positions = accepts_position_ids(self.model)
        columns = tensors.shape[1]
        layers = DynamicCache(config=self.model.config).layers
        self._cache = Cache(layers=[StaticLayer(columns, self._position) for _ in layers])
        if backend is not None:
            for parameter in (self.head.weight, self.head.bias):
                if parameter is not None:
                    at_fixed_address(parameter)

    def step(self, plan: StepPlan, end: int) -> None:
        """Read all columns before `end` that are new, and draw the next tokens."""
        pending = end - self.fed
        is_first, self.fed = self.fed == 0, end
        width = next((width for width in WIDTHS if width >= pending), pending)
        if self._backend is None or is_first or width not in WIDTHS:
            self._run(plan._replace(width=pending))
            return
        self.counts[1] += 1
        plan = plan._replace(width=width)
        if plan not in self._functions:
            self._functions[plan] = self._compile(plan)
        torch.compiler.cudagraph_mark_step_begin()
        self.counts[0] += self._functions[plan]()

    def read(self, end: int, keeps_states: bool) -> None:
        """Read all columns before `end` that are new, without drawing."""
        if end > self.fed:
            self._read(end - self.fed, keeps_states)
            self.fed = end

    def restart(self) -> None:
        """Forget the columns of the last batch, whose keys may be infinite or NaN, also times 0."""
        self.fed = 0
        self._cache.reset()

    def _compile(self, plan: StepPlan) -> Callable[[], bool]:
        def step() -> bool:
            self._run(plan)
            return torch.compiler.is_compiling()

        # dynamo caches compilations, and limits their number, per code object. A code object for each shape, model and
        # plan keeps their limits separate and frees the compilations with the function.
        code = step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
        own = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
        mode = "reduce-overhead" if self._backend == "inductor" else None
        assert self._backend is not None
        return torch.compile(own, backend=self._backend, dynamic=False, mode=mode)

    def _run(self, plan: StepPlan) -> None:
        tensors = self.tensors
        newest = self._read(plan.width, plan.keeps_states)
        logits = self.head.logits(newest, plan.vocab_size).to(tensors.drawn.device)
        uniforms = None
        if not plan.is_greedy:
            logits = logits / tensors.temperature
            uniforms = tensors.uniforms.index_select(1, tensors.step[None]).squeeze(1)
        tokens = draw_tokens(logits, uniforms, 1.0)
        if plan.overrides:
            coins = tensors.coins.index_select(1, tensors.step[None]).squeeze(1)
            tokens = torch.where(coins, tokens, tensors.drawn)
        tensors.drawn.copy_(tokens)
        if plan.appends:
            tensors.append(plan)

    def _read(self, width: int, keeps_states: bool) -> torch.Tensor:
        """Read the newest columns, and return the last hidden states `(R, H)` of the newest one."""
        tensors = self.tensors
        start = tensors.end - width
        self._position.copy_(start)
        columns = start + torch.arange(width, device=start.device)
        inputs: dict[str, Any] = {
            "input_ids": tensors.ids.index_select(1, columns).to(self._device),
            "attention_mask": tensors.mask.to(self._device),
            self._cache_argument: self._cache,
        }
        if self._takes_positions:
            inputs["position_ids"] = tensors.positions.index_select(1, columns).to(self._device)
        hidden_states = self.model.base_model(**inputs, use_cache=True).last_hidden_state
        if keeps_states:
            if self.states is None:
                self.states = at_fixed_address(hidden_states.new_zeros(*tensors.shape, hidden_states.shape[2]))
            self.states.index_copy_(1, columns.to(hidden_states.device), hidden_states)
        return hidden_states[:, -1].to(self.head.weight.device)


class _Shape(NamedTuple):
    """Tensors of one shape, and the readers of the models whose steps are compiled."""

    tensors: StepTensors
    readers: list[Reader]


class CompiledDecoding:
    """Compiled steps of a student, and of its teacher, for batches that share tensors.

    Launching a decoding step of a small model can take longer than computing it. A CUDA graph launches the whole step
    at once, but needs all tensors at fixed addresses: the cache has room for all tokens from the start, and finished
    rows stay in it. The graph holds the model's body and head, the draw and the end test, so the host neither launches
    these nor waits for a token.

    To keep the number of shapes small, tensors have a power of two of columns, and batches of down to half their rows
    use them. A step is compiled for 1, 4 and 16 columns. Shapes that are no longer used are freed. Steps that ran
    without compilation are counted, and the first one is logged as a warning.

    Args:
        student ([`~transformers.PreTrainedModel`]): the model that decodes, unwrapped, in eval mode.
        backend (`str`): backend of `torch.compile`: `"inductor"` (generates kernels, with CUDA graphs on a GPU; needs
            Triton there, and a C++ compiler on a CPU) or `"cudagraphs"` (CUDA graphs alone, without Triton).
        teacher ([`~transformers.PreTrainedModel`], *optional*): a teacher whose steps are compiled too. Its weights
            must stay at their addresses.
    """

    def __init__(self, student: PreTrainedModel, backend: str, teacher: PreTrainedModel | None = None):
        self.models = [student] if teacher is None else [student, teacher]
        self._backend = backend
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._used: dict[tuple[int, int], int] = {}  # number of the last batch that used each shape
        self._batches = 0
        self._has_warned = False

    def start(self, models: Sequence[PreTrainedModel], rows: int, length: int) -> tuple[StepTensors, list[Reader]]:
        """Return the tensors and the readers for a batch of `rows` rows of at most `length` tokens.

        Args:
            models: the student and, if it draws tokens, a teacher, which may be another one than that of this object;
                its steps then are not compiled.
        """
        length = static_columns(length)
        fitting = [own for own, columns in self._shapes if rows <= own <= _MAX_ROWS_RATIO * rows and columns == length]
        key = max(fitting, default=rows), length
        self._batches += 1
        self._used[key] = self._batches
        for idle in [shape for shape, batch in self._used.items() if self._batches - batch > _IDLE_BATCHES]:
            del self._shapes[idle], self._used[idle]
        if key not in self._shapes:
            device = self.models[0].get_output_embeddings().weight.device
            tensors = StepTensors(*key, device)
            self._shapes[key] = _Shape(tensors, [Reader(model, tensors, self._backend) for model in self.models])
        tensors, own_readers = self._shapes[key]
        readers = []
        for number, model in enumerate(models):
            is_compiled = number < len(self.models) and self.models[number] is model
            readers.append(own_readers[number] if is_compiled else Reader(model, tensors, None))
            readers[-1].restart()
        return tensors, readers

    def note(self, readers: Sequence[Reader]) -> None:
        """Warn once if a step of these readers that is compiled ran without compilation."""
        if self._has_warned or all(compiled == steps for compiled, steps in (reader.counts for reader in readers)):
            return
        self._has_warned = True
        logger.warning(
            f"A decoding step over {readers[0].tensors.shape[0]} rows and {readers[0].tensors.shape[1]} columns runs "
            "without compilation: torch.compile has reached its recompilation limit, or is switched off. The metric "
            'rollout/compiled_steps has the share of compiled steps; TORCH_LOGS="recompiles" prints the reasons.'
        )

    def take_counts(self) -> tuple[int, int]:
        """Return the decoding steps since the last call: how many ran compiled, and how many should have."""
        readers = [reader for shape in self._shapes.values() for reader in shape.readers]
        compiled, total = (sum(reader.counts[which] for reader in readers) for which in (0, 1))
        for reader in readers:
            reader.counts = [0, 0]
        return compiled, total
