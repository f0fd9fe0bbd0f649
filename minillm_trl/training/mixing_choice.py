"""`MixingChoice`: how rollouts are sampled from the mixture, as configured or measured."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UserError
from ..rollouts.rollout_sampler import RolloutSampler

logger = logging.get_logger(__name__)

METHODS = ("coins", "speculative")

_ROWS, _TOKENS, _ROUNDS = 8, 64, 2  # of the measurement, at most
_KEY = (2**31 - 1,)  # of its random numbers, which no rollout uses


class MixingChoice:
    """The way of mixing of a run; with `mixing="auto"`, a measurement at the first rollout decides.

    Args:
        mixing (`str`): the configured way.
        accelerator ([`~accelerate.Accelerator`]): the trainer's. All processes decide together.
        is_sharded (`bool`): whether the teacher is sharded over processes, which only coins can sample from.

    Attributes:
        method (`str`): `"coins"` or `"speculative"`, or `"auto"` before the decision.

    Raises:
        ValueError: for `mixing="speculative"` with a sharded teacher.
    """

    def __init__(self, mixing: str, accelerator: Accelerator, is_sharded: bool):
        if is_sharded and mixing != "coins":
            raise UserError(
                f"mixing={mixing!r} does not work with a teacher that is sharded over processes, which would need it "
                "after different numbers of tokens. Set mixing='coins'."
            )
        self._configured = self.method = mixing
        self._accelerator = accelerator

    def reset(self) -> None:
        """Return to the configured way, before a run starts."""
        self.method = self._configured

    def state(self) -> dict[str, Any]:
        """Return the decision, for a checkpoint."""
        return {"mixing": self.method}

    def restore(self, saved: dict[str, Any]) -> None:
        """Keep the decision of a run that is resumed, which older checkpoints lack. A configured way wins."""
        if self._configured == "auto":
            self.method = saved.get("mixing", "auto")

    def applied_to(
        self, sampler: RolloutSampler, student: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], length: int
    ) -> RolloutSampler:
        """Return the sampler with its way of mixing, after a measurement if this is still to decide."""
        if sampler.alpha == 0.0:
            return sampler
        if self.method == "auto":
            self._decide(sampler, student, prompt_ids, length)
        return replace(sampler, mixing=self.method)

    def _decide(
        self, sampler: RolloutSampler, student: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], length: int
    ) -> None:
        seconds = measure_mixing(sampler, student, prompt_ids, min(length, _TOKENS))
        own = torch.tensor([seconds[name] for name in METHODS], device=self._accelerator.device)
        mean = (self._accelerator.reduce(own, reduction="sum") / self._accelerator.num_processes).tolist()
        self.method = METHODS[mean.index(min(mean))]
        if self._accelerator.is_main_process:
            listed = " and ".join(
                f"{1e3 * value:.2f} ms with {name}" for name, value in zip(METHODS, mean, strict=True)
            )
            logger.warning(
                f"mixing='auto' chose {self.method!r}: a token took {listed}. Checkpoints store the "
                f"choice; set mixing={self.method!r} to sample the same in another run."
            )


def measure_mixing(
    sampler: RolloutSampler, student: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], length: int
) -> dict[str, float]:
    """Return the seconds that a token takes with each way of mixing, the least of a few rounds.

    The ways alternate. Their samples are dropped; nothing that a rollout draws depends on them. For a student on a
    CPU, seconds are those of this process, so that other jobs do not decide. An accelerator's work counts as elapsed.
    """
    on_cpu = student.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    prompt_ids = prompt_ids[:_ROWS]
    keys = [(*_KEY, row) for row in range(len(prompt_ids))]
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(_ROUNDS):
        for name, seconds in found.items():
            start = clock()
            turn = replace(sampler, mixing=name).sample(student, prompt_ids, keys, _KEY, length)
            if not on_cpu:
                torch.accelerator.synchronize(student.device)
            seconds.append((clock() - start) / sum(map(len, turn.completions)))
    return {name: min(seconds) for name, seconds in found.items()}
