"""Rewards and advantages of a rollout: those of reward functions, and those of the teacher."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from trl import GRPOTrainer

from ..config import MiniLLMConfig
from ..masking import masked_moments
from ..objectives import batch_advantages, leave_one_out_baseline, replace_by_group_mean, reward_to_go, whiten
from ..positions import prefix_discrepancy_weights, top_entropy_weights
from .logged_metrics import Totals, baseline_totals


def placeholder_reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
    """Stand in for the reward function that GRPOTrainer's constructor requires; removed before the first rollout."""
    raise RuntimeError("The placeholder for GRPOTrainer's constructor must never be called.")


def remove_placeholder(trainer: GRPOTrainer) -> None:
    """Remove [`placeholder_reward`], the first reward function; an environment may have added others after it."""
    for sources in (trainer.reward_funcs, trainer.reward_func_names, trainer.reward_processing_classes):
        del sources[0]
    trainer.reward_weights = trainer.reward_weights[1:]


@dataclass(frozen=True)
class FunctionRewards:
    """Rewards of reward functions for the completions of all processes.

    Args:
        values (`torch.Tensor` of shape `(B_all, F)`): rewards; an infinite one is replaced by the mean of its group.
            NaN marks rows that do not count.
        infinite (`torch.Tensor` of shape `(B_all, F)`, bool): True for rewards that were infinite.
    """

    values: torch.Tensor
    infinite: torch.Tensor

    @classmethod
    def of(cls, rewards: torch.Tensor, group: int) -> "FunctionRewards":
        """Return the rewards `(B_all, F)` of functions, in groups of `group` neighbours."""
        infinite = rewards.isinf()
        return cls(replace_by_group_mean(rewards, infinite, group), infinite)

    def faults(self, first: int, num_rows: int, names: list[str]) -> dict[int, str]:
        """Explain the infinite rewards of a process, by row; `first` is the number of its first row."""
        own = self.infinite[first:][:num_rows]
        return {row: f"reward function {names[function]} returned inf" for row, function in own.nonzero().tolist()}


class RolloutAdvantages:
    """Compute the advantages of the tokens of a rollout.

    Args:
        args ([`MiniLLMConfig`]): arguments of the run.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
    """

    def __init__(self, args: MiniLLMConfig, accelerator: Accelerator):
        assert args.num_generations is not None  # set by GRPOConfig
        assert args.max_completion_length is not None
        self.args = args
        self.accelerator = accelerator
        self.num_generations: int = args.num_generations
        self.max_completion_length: int = args.max_completion_length

    def of_buffer(self, rewards: FunctionRewards, weights: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Return the advantages `(num_rows,)` of this process's rewards of functions, relative to the whole buffer."""
        advantages = batch_advantages(
            rewards.values,
            weights.to(rewards.values.device),
            scale=self.args.scale_rewards != "none",
            normalize_each=self.args.multi_objective_aggregation == "normalize_then_sum",
        )
        return advantages[self.accelerator.process_index * num_rows :][:num_rows]

    def of_teacher(
        self,
        rewards: torch.Tensor,
        expected_rewards: torch.Tensor | None,
        mask: torch.Tensor,
        faulty: torch.Tensor,
        baseline: str,
    ) -> tuple[torch.Tensor, Totals | None]:
        """Return the advantages `(B, T)` of the teacher's rewards: returns, less a baseline, whitened on request.

        Args:
            rewards (`torch.Tensor` of shape `(B, T)`): rewards of the sampled tokens, in nats.
            expected_rewards (`torch.Tensor` of shape `(B, T)`, *optional*): take their place after the current token.
            mask (`torch.Tensor` of shape `(B, T)`): True on the trained tokens.
            faulty (`torch.Tensor` of shape `(B,)`): True for rows to leave out.
            baseline (`str`): "none", "position" or "group".

        Returns:
            `tuple`: the advantages, and with a baseline the totals for the variance that it explains.
        """
        if not self.args.rkl_advantage:
            return torch.zeros_like(rewards), None
        assert self.args.include_current_reward is not None  # set by MiniLLMConfig
        advantages = reward_to_go(
            rewards.masked_fill(faulty[:, None], 0.0),
            mask,
            gamma=self.args.gamma,
            include_current=self.args.include_current_reward,
            length_normalization=self.args.length_normalization,
            discounted_length=self.args.discounted_length,
            future_rewards=None if expected_rewards is None else expected_rewards.masked_fill(faulty[:, None], 0.0),
        )
        mask, totals = mask & ~faulty[:, None], None
        if baseline != "none":
            returns = advantages
            advantages = returns - self._baseline(returns, mask, baseline)
            totals = baseline_totals(returns, advantages, mask)
        if self.args.whiten_advantages == "none":
            return advantages, totals
        moments = masked_moments(advantages, mask)
        if self.args.whiten_advantages == "padding":
            moments[0] = (~faulty).sum() * self.max_completion_length
        return whiten(advantages, mask, self.accelerator.reduce(moments, reduction="sum")), totals

    def token_weights(
        self, rewards: torch.Tensor, entropy: torch.Tensor | None, mask: torch.Tensor, faulty: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return `token_weights` `(B, T)`, the factors of the loss of each token, or nothing if all are 1.

        Args:
            rewards, mask, faulty (`torch.Tensor`): as in [`of_teacher`].
            entropy (`torch.Tensor` of shape `(B, T)`, *optional*): the student's, if `top_entropy_quantile` needs it.
        """
        weights, mask = [], mask & ~faulty[:, None]
        if self.args.iw_opd_gamma > 0.0:
            weights.append(prefix_discrepancy_weights(rewards, mask, self.args.iw_opd_gamma))
        if self.args.top_entropy_quantile < 1.0:
            assert entropy is not None  # the scorer measures it
            select = partial(top_entropy_weights, quantile=self.args.top_entropy_quantile)
            weights.append(self._over_processes(select, entropy, mask))
        return {"token_weights": math.prod(weights[1:], start=weights[0])} if weights else {}

    def _baseline(self, returns: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
        """Return the baseline of each token `(B, T)`, from the masked tokens of all processes."""

        def of_all(values: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(len(values), device=values.device)
            groups = rows // self.num_generations if kind == "group" else torch.zeros_like(rows)
            return leave_one_out_baseline(values, alive, groups)

        return self._over_processes(of_all, returns, mask)

    def _over_processes(
        self,
        function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Apply a function of values and mask `(B_all, T_all)` of all processes; return this process's `(B, T)`."""
        gathered, alive = (  # as integers, which padding would make of a bool tensor anyway
            self.accelerator.gather(self.accelerator.pad_across_processes(tensor, dim=1))
            for tensor in (values, mask.int())
        )
        first = self.accelerator.process_index * len(values)
        return function(gathered, alive.bool())[first : first + len(values), : values.shape[1]]
