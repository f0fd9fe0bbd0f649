"""`RolloutMetrics`: metrics of rollouts and updates, as means over all completions since the last log."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..loss import LossTerms
from ..masking import masked_mean
from ..models.fused_head import TokenScores
from ..rollouts.buffer import Batch, sequences
from .logged_metrics import (
    completion_sums,
    completion_totals,
    degeneration_indicators,
    gradient_totals,
    loss_totals,
    reward_metrics,
    rouge_l_to_references,
    teacher_totals,
)
from .nonfinite_rows import explain_losses
from .run_metrics import RunMetrics


class CompletionTable:
    """GRPO's table of logged completions.

    Args:
        columns (`dict`): nested dicts of deques, one for each column.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        logged (`bool`): whether the run logs completions.
    """

    def __init__(self, columns: dict[str, Any], accelerator: Accelerator, logged: bool):
        self.columns = columns
        self.accelerator = accelerator
        self.logged = logged
        self.shown_at: int | None = None  # step of the last log

    def correct(self, batch: Batch, counts: Sequence[bool]) -> None:
        """Correct the rows of the last rollout: add the teacher's advantages, remove fillers (not in `counts`)."""
        advantages = masked_mean(batch["advantages"], sequences(batch)[2], dim=1)
        logged = self.columns["advantages"]
        advantages = self.accelerator.gather(advantages).tolist()
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)
        if all(counts):
            return
        columns = [self.columns[name] for name in ("prompt", "completion", "advantages")]
        for column in (*columns, *self.columns["rewards"].values(), *self.columns["extra"].values()):
            last = [column.pop() for _ in range(min(len(counts), len(column)))]  # the newest one first
            kept = [value for value, is_real in zip(last, reversed(counts), strict=False) if is_real]
            column.extend(reversed(kept))

    def reset(self) -> None:
        """Do nothing: new rows replace the old ones."""

    def state(self) -> dict[str, Any]:
        """Return the rows that the next log shows."""
        return {"completions": _plain(self.columns) if self.logged else {}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Append the saved rows."""
        for name, values in saved["completions"].items():
            _extend(self.columns[name], values)


class RolloutMetrics:
    """Log metrics of rollouts, rewards and updates.

    GRPO logs means of per-rollout means instead, which include the fillers in the last batch of an evaluation.

    Args:
        means ([`RunMetrics`]): averages over micro-batches and processes.
        logged (`dict`): TRL's metrics by mode and name.
        table ([`CompletionTable`]): the logged completions.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        groups (`dict`): completions of each prompt, by mode.
        reward_names (`Sequence[str]`): names of the reward functions.
        reward_weights (`torch.Tensor` of shape `(F,)`): their weights.
        of_sequences (`bool`): whether the loss is a mean over sequences, and not over tokens.
        teacher_names (`Sequence[str]`): names of the teachers, if there are several.
    """

    def __init__(
        self,
        means: RunMetrics,
        logged: dict[str, Any],
        table: CompletionTable,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        groups: dict[str, int],
        reward_names: Sequence[str],
        reward_weights: torch.Tensor,
        of_sequences: bool,
        teacher_names: Sequence[str] = (),
    ):
        self.means = means
        self.logged = logged
        self.table = table
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        self.groups = groups
        self.reward_names = list(reward_names)
        self.reward_weights = reward_weights
        self.of_sequences = of_sequences
        self.teacher_names = list(teacher_names)
        self._eval_rewards: list[torch.Tensor] = []
        self._term_gradients: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this step's micro-batches

    def add_rollout(
        self,
        mode: str,
        rows: list[dict[str, Any]],
        batch: Batch,
        counts: torch.Tensor,
        rewards: torch.Tensor,
        eos_token_ids: list[int],
    ) -> None:
        """Add the completions and rewards of a rollout.

        Args:
            mode (`str`): "train" or "eval".
            rows (`list[dict]`): rows of the dataset.
            batch (`dict` of `torch.Tensor`): the scored rollout.
            counts (`torch.Tensor` of shape `(B,)`, bool): False for fillers.
            rewards (`torch.Tensor` of shape `(B_all, F)`): rewards of functions, of all processes.
            eos_token_ids (`list[int]`): tokens that end a completion.
        """
        mask = sequences(batch)[2]
        completions = zip(batch["completion_ids"].cpu(), mask.cpu(), strict=True)
        ids = [row[real].tolist() for row, real in completions]
        values = degeneration_indicators(ids, eos_token_ids)
        if mode == "eval":
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            values["rouge_l"] = rouge_l_to_references(texts, rows)
            for number, name in enumerate(self.teacher_names):
                own = (batch["teacher_index"] == number).tolist()
                pairs = zip(values["rouge_l"], own, strict=True)
                values[f"rouge_l/{name}"] = [value if is_own else math.nan for value, is_own in pairs]
        ended = self._ended(batch, eos_token_ids)
        for name in [name for name in self.logged[mode] if name.startswith("completions/")]:
            del self.logged[mode][name]  # GRPO's means of per-rollout means
        self.means.add(mode, completion_totals(mask.sum(dim=1), ended, values, counts))
        counts = self.accelerator.gather(counts)
        self._add_rewards(mode, rewards[counts])
        self.table.correct(batch, counts.tolist())

    def _ended(self, batch: Batch, eos_token_ids: list[int]) -> torch.Tensor:
        """Return which completions `(B,)` ended before the length limit, by GRPO's rule; empty ones did."""
        lengths = batch["completion_mask"].sum(dim=1)
        last = batch["completion_ids"].gather(1, (lengths - 1).clamp(min=0)[:, None].long())[:, 0]
        ends = torch.tensor([*eos_token_ids, self.tokenizer.pad_token_id], device=last.device)
        return torch.isin(last, ends) | (lengths == 0)

    def _add_rewards(self, mode: str, rewards: torch.Tensor) -> None:
        """Drop GRPO's metrics of rewards and groups that do not exist; keep rewards until an evaluation ends."""
        dropped = [] if self.reward_names else ["reward", "reward_std"]
        dropped += ["frac_reward_zero_std"] if self.groups[mode] == 1 or not self.reward_names else []
        for name in dropped:
            self.logged[mode].pop(name, None)
        if mode == "eval" and self.reward_names:
            self._eval_rewards.append(rewards)

    def finish_eval_rewards(self) -> None:
        """Replace GRPO's metrics of rewards in an evaluation by those of all its completions together."""
        if not self._eval_rewards:
            return
        rewards = torch.cat(self._eval_rewards)
        metrics = reward_metrics(rewards, self.reward_weights, self.reward_names, self.groups["eval"])
        for name in metrics.keys() & self.logged["eval"].keys():
            self.logged["eval"][name] = [metrics[name]]
        self._eval_rewards.clear()

    def add_update(
        self,
        mode: str,
        terms: LossTerms,
        scores: TokenScores,
        inputs: Batch,
        mask: torch.Tensor,
        counts: torch.Tensor,
    ) -> list[str]:
        """Add the terms of a micro-batch's loss, and in an evaluation the loss.

        Args:
            mode (`str`): "train" or "eval".
            terms ([`LossTerms`]), scores ([`TokenScores`]): terms and scores of its tokens.
            inputs (`dict` of `torch.Tensor`): the micro-batch.
            mask (`torch.Tensor` of shape `(B, T)`): True on the trained tokens.
            counts (`torch.Tensor` of shape `(B,)`, bool): True for rows that count.

        Returns:
            `list[str]`: explanations of a loss that is not finite, in training.
        """
        rows = inputs["counts"].sum() if "counts" in inputs else len(mask)
        totals = loss_totals(terms, scores.entropy, inputs["advantages"], mask, rows)
        faults = explain_losses(terms.loss, inputs) if mode == "train" else []
        if faults or (mode == "train" and inputs["faulty"].any()):
            # a faulty row became padding; both would distort the means
            totals = totals._replace(values=torch.zeros_like(totals.values))
        self.means.add(mode, totals)
        if self.teacher_names:
            of_teachers = teacher_totals(
                terms, mask, inputs["teacher_index"], inputs.get("counts"), self.teacher_names
            )
            if not totals.values.any():  # a faulty row, see above
                of_teachers.values.zero_()
            self.means.add(mode, of_teachers)
        if scores.term_gradients is not None:
            self._add_gradients(scores.term_gradients, inputs["half"], mask)
        if "prompt_index" in inputs:  # not in batches of `score_rollouts`, which may differ in size between processes
            self.means.add_values(mode, "objective/reverse_kl", completion_sums(terms.reverse_kl, mask, counts))
        if mode == "eval":
            assert scores.loss is not None  # the request had a loss
            self.means.add_eval_loss(scores.loss, rows if self.of_sequences else mask.sum())
        return faults

    def _add_gradients(self, term_gradients: torch.Tensor, half: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the gradients of a micro-batch by term and half; log them at the end of the optimizer step."""
        tokens = torch.stack([mask[half == number].sum() for number in range(2)])
        self._term_gradients.append((term_gradients, tokens))
        if not self.accelerator.sync_gradients:
            return
        gradients, tokens = (
            self.accelerator.reduce(sum(parts), reduction="sum") for parts in zip(*self._term_gradients, strict=True)
        )
        self._term_gradients = []
        self.means.add("train", gradient_totals(gradients, tokens))


def _plain(logged: Any) -> Any:
    """Convert nested dicts and deques to dicts and lists, which load without running code."""
    return {name: _plain(values) for name, values in logged.items()} if isinstance(logged, dict) else list(logged)


def _extend(logged: Any, values: Any) -> None:
    """Append what [`_plain`] returned to nested dicts and deques."""
    if isinstance(values, dict):
        for name, more in values.items():
            _extend(logged[name], more)
    else:
        logged.extend(values)
