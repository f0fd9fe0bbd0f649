"""The loop that decodes a batch in compiled steps; the host looks only now and then whether all rows have finished."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.attention import grouped_attention
from ..models.lm_head import accepts_position_ids, position_ids, rounding_tolerance, without_wrapper
from .coins import Coins, given_coins
from .compiled_steps import CompiledDecoding, Reader, StepPlan, StepTensors, first_column
from .slot_sampling import FinishedRow

# A look waits for the device. Steps after the last row has finished change nothing.
_STEPS_BETWEEN_LOOKS = 8


@dataclass
class CompiledSampling:
    """Decode a batch of prompts, all of which start together.

    Args:
        compiled ([`CompiledDecoding`]): the compiled steps.
        models (`list[PreTrainedModel]`): the student and, with coins, the teacher.
        prompts (`Sequence[Sequence[int]]`): token ids; a row without any has finished.
        max_new_tokens (`int`): length limit N.
        plan ([`StepPlan`]): what all steps have in common.
        uniforms (`np.ndarray` of shape `(B, N)`, *optional*): the number that draws each token; None decodes greedily.
        temperature (`float`): of both models.
        coins (`Coins`, *optional*): where the teacher draws.
        on_every_process (`Callable`, *optional*): see [`~minillm_trl.rollouts.sampling.sample_completions`].
    """

    compiled: CompiledDecoding
    models: list[PreTrainedModel]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    plan: StepPlan
    uniforms: np.ndarray | None
    temperature: float
    coins: Coins | None = None
    on_every_process: Callable[[bool], bool] | None = None
    tensors: StepTensors = field(init=False)
    readers: list[Reader] = field(init=False)

    def __post_init__(self) -> None:
        length = first_column(self.prompts) + self.max_new_tokens
        self.tensors, self.readers = self.compiled.start(self.models, len(self.prompts), length)

    def run(self) -> Iterator[FinishedRow]:
        """Yield each row, in order, after the last one has finished."""
        coins = self._coin_table()
        first = end = self.tensors.start(self.prompts, self.uniforms, coins, self.temperature)
        for step in range(self.max_new_tokens):
            if step % _STEPS_BETWEEN_LOOKS == 0 and self._everywhere(not bool(self.tensors.unfinished.any())):
                break
            self._draw_step(None if coins is None else coins[:, step], end)
            end += 1
        self.compiled.note(self.readers)
        lengths = self.tensors.lengths.tolist()
        if self.plan.keeps_states:
            self._complete_states(first + max(lengths[: len(self.prompts)]) - 1, end)
        for row in range(len(self.prompts)):
            columns = slice(first, first + lengths[row])
            before = slice(first - 1, first + lengths[row] - 1)
            states = [reader.states[row, before].clone() for reader in self.readers if reader.states is not None]
            yield FinishedRow(row, self.tensors.ids[row, columns].clone(), states if self.plan.keeps_states else [])

    def _everywhere(self, flag: bool) -> bool:
        return flag if self.on_every_process is None else self.on_every_process(flag)

    def _coin_table(self) -> np.ndarray | None:
        """Return the coins of all steps, `(B, N)` or, if the rows share them, `(1, N)`."""
        if self.coins is None:
            return None
        rows = np.arange(len(self.prompts))
        steps = [self.coins(rows, np.full(len(rows), step), step) for step in range(self.max_new_tokens)]
        return np.stack(steps, axis=1)

    def _draw_step(self, coins: np.ndarray | None, end: int) -> None:
        """Draw the next token of each row, the teacher after the student."""
        student = self.readers[0]
        if coins is None:
            student.step(self.plan, end)
            return
        # either all processes call a sharded teacher, or none
        teacher_draws = not self._everywhere(not coins.any())
        if not coins.all():
            student.step(self.plan._replace(appends=not teacher_draws), end)
        if teacher_draws:
            self.readers[1].step(self.plan._replace(overrides=True), end)

    def _complete_states(self, needed: int, end: int) -> None:
        """Let each model read the columns that predict tokens and that it has not read."""
        for reader in self.readers:
            # processes cannot know whether another one needs the call, so with a sharded model all make it
            if reader.fed < needed or self.on_every_process is not None:
                reader.read(end, keeps_states=True)


@torch.no_grad()
@grouped_attention()
def check_compiled_decoding(model: PreTrainedModel, name: str) -> None:
    """Check on a short input that steps over a static cache see what a plain forward pass sees.

    Raises:
        ValueError: if the hidden states differ. Sampling from such a model would be silently wrong.
    """
    model = without_wrapper(model)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    prompts = [[token % vocab_size for token in range(1, length)] for length in (20, 9)]
    # the first reader then takes a compiled step of several columns, and the second one of a single column
    coins = np.array([[False, True, True, False]])
    plan = StepPlan(1, False, True, True, True, vocab_size, (), 0)
    compiled = CompiledDecoding(model, "eager", model)
    sampling = CompiledSampling(
        compiled, [model, model], prompts, coins.shape[1], plan, None, 1.0, given_coins(coins, shared=True)
    )
    for prompt, row in zip(prompts, sampling.run(), strict=True):
        ids = torch.tensor([prompt], device=row.tokens.device)
        inputs = {"input_ids": torch.cat([ids, row.tokens[None, :-1]], dim=1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if accepts_position_ids(model):
            inputs["position_ids"] = position_ids(inputs["attention_mask"])
        expected = model.base_model(**inputs, use_cache=False).last_hidden_state[0, len(prompt) - 1 :].float()
        for states in row.states:
            error = (states.float() - expected).abs().max().item()
            largest = max(1.0, expected.abs().max().item())
            if not error <= largest * rounding_tolerance(states.dtype, roundings=12):
                raise UserError(
                    f"The steps of the {name} ({type(model).__name__}) cannot be compiled: over a static cache its "
                    f"hidden states differ by up to {error:.2g} from a plain forward pass. Set compile_rollouts: null."
                )
