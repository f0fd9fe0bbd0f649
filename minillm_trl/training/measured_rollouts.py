"""`MeasuredRollouts`: rewards and advantages of rollouts, and their metrics over all completions that count."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..loss import LossTerms
from ..masking import masked_mean, masked_moments
from ..models.fused_head import TokenScores
from ..models.init_kwargs import parsed_kwargs
from ..objectives import batch_advantages, leave_one_out_baseline, replace_by_group_mean, reward_to_go, whiten
from ..positions import prefix_discrepancy_weights, rollout_horizon, top_entropy_weights
from ..rollouts.buffer import Batch, sequences
from ..rollouts.keyed_random import GIVEN
from .given_completions import choose_given
from .logged_metrics import (
    baseline_totals,
    completion_sums,
    completion_totals,
    degeneration_indicators,
    gradient_totals,
    loss_totals,
    reward_metrics,
    rouge_l_to_references,
)
from .nonfinite_rows import explain_losses, name_rows
from .resumable_rollouts import FILLER, PROMPT_INDEX, ResumableRollouts
from .rollout_in_progress import RolloutInProgress


def placeholder_reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
    """Stand in for the reward function that GRPOTrainer's constructor requires; removed before the first rollout."""
    raise RuntimeError("The placeholder for GRPOTrainer's constructor must never be called.")


class MeasuredRollouts(ResumableRollouts):
    """Compute advantages, and metrics of rollouts and rewards as means over all completions since the last log.

    GRPO logs means of per-rollout means instead, which include the fillers in the last batch of an evaluation.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._eval_rewards: list[torch.Tensor] = []
        self._rollout = RolloutInProgress(torch.empty(0, dtype=torch.bool))  # replaced for each rollout
        self._shown_at: int | None = None  # step of the last log
        self._term_gradients: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this step's micro-batches

    def _take_rows(self, rows: list[dict[str, Any]]) -> tuple[list[int], torch.Tensor, list[dict[str, Any]]]:
        """Split rows into their numbers in the dataset (-1 if unknown), whether they count, and the user's columns."""
        counts = torch.tensor([FILLER not in row for row in rows], device=self.accelerator.device)
        prompt_index = [row.get(PROMPT_INDEX, -1) for row in rows]
        added = (PROMPT_INDEX, FILLER)
        return prompt_index, counts, [{name: row[name] for name in row if name not in added} for row in rows]

    def _given_completions(self, rows: list[dict[str, Any]]) -> list[list[int] | None]:
        """Return the dataset's completion of each row that trains on it; nothing if all rows are sampled."""
        if not self.model.training or self.args.lmbda == 1.0:
            return []
        step, first = self.state.global_step, self.accelerator.process_index * len(rows)
        keys = [(self.args.seed, GIVEN, step, first + row) for row in range(len(rows))]
        kwargs = parsed_kwargs(self.chat_template_kwargs)
        return choose_given(rows, self.args.lmbda, keys, self._tokenizer, kwargs)

    # Rewards

    def _remove_placeholder_reward(self) -> None:
        """Remove [`placeholder_reward`], the first reward function; an environment may have added others after it."""
        for sources in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
            del sources[0]
        self.reward_weights = self.reward_weights[1:]

    def _note_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Store and return rewards `(B_all, F)`, with infinite ones replaced, and NaN for rows that do not count."""
        if not self.model.training:  # NaN keeps fillers out of all means
            rewards = rewards.masked_fill(~self.accelerator.gather(self._rollout.counts)[:, None], torch.nan)
        infinite = rewards.isinf()
        group = self.num_generations if self.model.training else self.num_generations_eval
        self._rollout.infinite_rewards = infinite
        self._rollout.rewards = replace_by_group_mean(rewards, infinite, group)
        return self._rollout.rewards

    def _mark_infinite_rewards(self, faulty: torch.Tensor) -> dict[int, str]:
        """Mark the completions of this process with an infinite reward as faulty, and explain them by row."""
        mine = self._rollout.infinite_rewards[self.accelerator.process_index * len(faulty) :][: len(faulty)]
        faulty |= mine.any(dim=1)
        return {
            row: f"reward function {self.reward_func_names[function]} returned inf"
            for row, function in mine.nonzero().tolist()
        }

    def _reward_advantages(self, group_advantages: torch.Tensor) -> torch.Tensor:
        """Return GRPO's advantages of the reward functions; without groups, relative to the whole buffer instead."""
        if (self.num_generations if self.model.training else self.num_generations_eval) > 1:
            return group_advantages
        advantages = batch_advantages(
            self._rollout.rewards,
            self.reward_weights.to(self._rollout.rewards.device),
            scale=self.scale_rewards != "none",
            normalize_each=self.multi_objective_aggregation == "normalize_then_sum",
        )
        return advantages[self.accelerator.process_index * len(group_advantages) :][: len(group_advantages)]

    # Advantages of the teacher's rewards

    def _advantages(
        self,
        rewards: torch.Tensor,
        expected_rewards: torch.Tensor | None,
        mask: torch.Tensor,
        faulty: torch.Tensor,
        baseline: str,
        log: bool,
    ) -> torch.Tensor:
        """Return the advantages `(B, T)` of the teacher's rewards: returns, less a baseline, whitened on request."""
        if not self.args.rkl_advantage:
            return torch.zeros_like(rewards)
        future_rewards = None if expected_rewards is None else expected_rewards.masked_fill(faulty[:, None], 0.0)
        assert self.args.include_current_reward is not None  # set by MiniLLMConfig
        advantages = reward_to_go(
            rewards.masked_fill(faulty[:, None], 0.0),
            mask,
            gamma=self.args.gamma,
            include_current=self.args.include_current_reward,
            length_normalization=self.args.length_normalization,
            discounted_length=self.args.discounted_length,
            future_rewards=future_rewards,
        )
        mask = mask & ~faulty[:, None]
        if baseline != "none":
            returns = advantages
            advantages = returns - self._baseline(returns, mask, baseline)
            if log:
                self._log_totals(baseline_totals(returns, advantages, mask))
        if self.args.whiten_advantages == "none":
            return advantages
        moments = masked_moments(advantages, mask)
        if self.args.whiten_advantages == "padding":
            moments[0] = (~faulty).sum() * self.max_completion_length
        return whiten(advantages, mask, self.accelerator.reduce(moments, reduction="sum"))

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

    @property
    def _horizon(self) -> int:
        """Return the token limit of a turn; evaluation has the whole one."""
        if not self.model.training:
            return self.max_completion_length
        args = self.args
        return rollout_horizon(
            self.state.global_step, self.max_completion_length, args.horizon_start, args.horizon_steps
        )

    def _token_weights(
        self, rewards: torch.Tensor, entropy: torch.Tensor | None, mask: torch.Tensor, faulty: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return `token_weights` `(B, T)`, the factors of the loss of each token, or nothing if all are 1."""
        weights, mask = [], mask & ~faulty[:, None]
        if self.args.iw_opd_gamma > 0.0:
            weights.append(prefix_discrepancy_weights(rewards, mask, self.args.iw_opd_gamma))
        if self.args.top_entropy_quantile < 1.0:
            assert entropy is not None  # the scorer measures it
            select = partial(top_entropy_weights, quantile=self.args.top_entropy_quantile)
            weights.append(self._over_processes(select, entropy, mask))
        return {"token_weights": math.prod(weights[1:], start=weights[0])} if weights else {}

    # Metrics

    def _log_rollouts(self, inputs: list[dict[str, Any]], batch: Batch) -> None:
        """Log metrics of a rollout's completions and rewards; `inputs` are its rows of the dataset."""
        mode = "train" if self.model.training else "eval"
        mask = sequences(batch)[2]
        completions = zip(batch["completion_ids"].cpu(), mask.cpu(), strict=True)
        ids = [row[real].tolist() for row, real in completions]
        values = degeneration_indicators(ids, self.eos_token_ids)
        if mode == "eval":
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            values["rouge_l"] = rouge_l_to_references(texts, inputs)
        ended = self._ended(batch)
        for name in [name for name in self._metrics[mode] if name.startswith("completions/")]:
            del self._metrics[mode][name]  # GRPO's means of per-rollout means
        self._log_totals(completion_totals(mask.sum(dim=1), ended, values, self._rollout.counts))
        counts = self.accelerator.gather(self._rollout.counts)
        self._log_rewards(mode, counts)
        self._log_table(batch, counts.tolist())

    def _ended(self, batch: Batch) -> torch.Tensor:
        """Return which completions `(B,)` ended before the length limit, by GRPO's rule; empty ones did."""
        lengths = batch["completion_mask"].sum(dim=1)
        last = batch["completion_ids"].gather(1, (lengths - 1).clamp(min=0)[:, None].long())[:, 0]
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        return torch.isin(last, ends) | (lengths == 0)

    def _halves(self, num_rows: int) -> torch.Tensor:
        """Return the half of the buffer, 0 or 1, of each row of this process `(B,)`.

        Completions of a prompt are in the same half. Each block of neighbours gives one row to each optimizer step, so
        halves of whole blocks also split each step into halves.
        """
        first = self.accelerator.process_index * num_rows
        rows = torch.arange(first, first + num_rows, device=self.accelerator.device)
        num_steps = self._steps_per_generation // self.args.gradient_accumulation_steps
        unit = math.lcm(num_steps, self.num_generations)
        if 2 * unit > num_rows * self.accelerator.num_processes:
            unit = self.num_generations
        return rows // unit % 2

    def _log_update(
        self, terms: LossTerms, scores: TokenScores, inputs: Batch, mask: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Log the terms of a micro-batch's loss; `counts` `(B,)` is True for rows that count."""
        rows = inputs["counts"].sum() if "counts" in inputs else len(mask)
        totals = loss_totals(terms, scores.entropy, inputs["advantages"], mask, rows)
        if self.model.training:
            self._faults += (late := explain_losses(terms.loss, inputs))
            if late or inputs["faulty"].any():  # a faulty row became padding; both would distort the means
                totals = totals._replace(values=torch.zeros_like(totals.values))
        self._log_totals(totals)
        if scores.term_gradients is not None:
            self._log_gradients(scores.term_gradients, inputs["half"], mask)
        if "prompt_index" in inputs:  # not in batches of `score_rollouts`, which may differ in size between processes
            self._log_values("objective/reverse_kl", completion_sums(terms.reverse_kl, mask, counts))
        if not self.model.training:
            assert scores.loss is not None  # the request had a loss
            self._add_eval_loss(scores.loss, rows if self.args.loss_reduction == "sequence_sum" else mask.sum())

    def _explain_loss(self, loss: float, inputs: Batch) -> str:
        return f"the loss is {loss} for {name_rows(inputs, torch.ones_like(inputs['faulty']))}"

    @contextmanager
    def _completions_shown_once(self, is_end: bool) -> Iterator[None]:
        """Print no completions in the last log of a run if a log at the same step has printed them."""
        wanted = self.log_completions
        self.log_completions = wanted and not (is_end and self._shown_at == self.state.global_step)
        try:
            yield
        finally:
            self.log_completions = wanted
        self._shown_at = self.state.global_step

    def _log_gradients(self, term_gradients: torch.Tensor, half: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the gradients of a micro-batch by term and half; log them at the end of the optimizer step."""
        tokens = torch.stack([mask[half == number].sum() for number in range(2)])
        self._term_gradients.append((term_gradients, tokens))
        if not self.accelerator.sync_gradients:
            return
        gradients, tokens = (
            self.accelerator.reduce(sum(parts), reduction="sum") for parts in zip(*self._term_gradients, strict=True)
        )
        self._term_gradients = []
        self._log_totals(gradient_totals(gradients, tokens))

    def _log_rewards(self, mode: str, counts: torch.Tensor) -> None:
        """Drop GRPO's metrics of rewards and groups that do not exist; keep rewards until an evaluation ends."""
        one = (self.num_generations if mode == "train" else self.num_generations_eval) == 1
        dropped = [] if self.reward_funcs else ["reward", "reward_std"]
        dropped += ["frac_reward_zero_std"] if one or not self.reward_funcs else []
        for name in dropped:
            self._metrics[mode].pop(name, None)
        if mode == "eval" and self.reward_funcs:
            self._eval_rewards.append(self._rollout.rewards[counts])

    def _log_table(self, batch: Batch, counts: list[bool]) -> None:
        """Correct the last rows of GRPO's table of completions: add the teacher's advantages, remove fillers."""
        advantages = masked_mean(batch["advantages"], sequences(batch)[2], dim=1)
        logged = self._logs["advantages"]
        advantages = self.accelerator.gather(advantages).tolist()
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)
        if all(counts):
            return
        columns = [self._logs[name] for name in ("prompt", "completion", "advantages")]
        for column in (*columns, *self._logs["rewards"].values(), *self._logs["extra"].values()):
            last = [column.pop() for _ in range(min(len(counts), len(column)))]
            column.extend(value for value, is_real in zip(last, reversed(counts), strict=False) if is_real)

    def _log_means(self) -> None:
        super()._log_means()
        if self._eval_rewards and not self.model.training:
            rewards = torch.cat(self._eval_rewards)
            metrics = reward_metrics(rewards, self.reward_weights, self.reward_func_names, self.num_generations_eval)
            for name in metrics.keys() & self._metrics["eval"].keys():
                self._metrics["eval"][name] = [metrics[name]]
            self._eval_rewards.clear()
