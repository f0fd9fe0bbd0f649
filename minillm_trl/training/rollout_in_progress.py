"""`RolloutInProgress`: the state that the methods called by GRPO share within one rollout."""

from dataclasses import dataclass, field

import torch

from ..rollouts.rollout_sampler import ScoredRows
from .rollout_rewards import FunctionRewards


@dataclass
class RolloutInProgress:
    """The state of one rollout, from its prompts to its batch.

    GRPO samples, requests log-probs and computes rewards in separate methods, which the trainer overrides. This object
    passes results from one method to the next, and is discarded with the rollout.

    Args:
        counts (`torch.Tensor` of shape `(B,)`, bool): rows of this process that count, that is, all but the fillers in
            the last batch of an evaluation.
        wants_old_logps (`bool`): whether GRPO's next request for log-probs is for the policy that sampled the rollout.
        turn (`int`): calls of the sampler so far, several with tools.
        given (`list[list[int] | None]`): completions from the dataset, None for rows to sample; empty without any.
        scores ([`ScoredRows`]): scores of completions computed so far.
        teacher_index (`list[int]`): number of each row's teacher; empty if there is one teacher.
        empty_rows (`list[int]`): rows that the rollout function left empty.
        rewards ([`FunctionRewards`]): rewards of each function for the rows of all processes.
    """

    counts: torch.Tensor
    wants_old_logps: bool = False
    turn: int = 0
    given: list[list[int] | None] = field(default_factory=list)
    scores: ScoredRows = field(default_factory=ScoredRows)
    teacher_index: list[int] = field(default_factory=list)
    empty_rows: list[int] = field(default_factory=list)
    rewards: FunctionRewards = field(default_factory=lambda: FunctionRewards(torch.empty(0), torch.empty(0)))

    def teacher_tensor(self) -> torch.Tensor | None:
        """Return the number of each row's teacher `(B,)`; None if there is one teacher."""
        return torch.tensor(self.teacher_index, device=self.counts.device) if self.teacher_index else None
