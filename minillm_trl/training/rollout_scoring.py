"""`RolloutScoring`: the training batch of a rollout, from the scores of student and teacher."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing

from ..config import MiniLLMConfig
from ..hardware.precision import autocast_on
from ..models.encoding import Prompt
from ..models.fused_head import ScoreRequest
from ..models.init_kwargs import parsed_kwargs
from ..objectives import expected_rewards, importance_weights, mixture_logps, token_rewards
from ..rollouts.buffer import Batch, assemble_fields, parts_by_length, sequences
from ..rollouts.cross_tokenizer import CrossTokenizerScorer
from ..rollouts.rollout_sampler import RolloutSampler, SampledTurn, ScoredRows
from ..rollouts.rollout_teacher import Teacher
from ..rollouts.scores import RolloutRequest, RolloutScorer, RolloutScores, TeacherStates
from .checks import check_completion_ids
from .logged_metrics import Totals
from .nonfinite_rows import explain_faults
from .rollout_rewards import RolloutAdvantages
from .turns import Turn


class ScoredBatch(NamedTuple):
    """The training batch of a rollout.

    Attributes:
        batch (`dict` of `torch.Tensor`): result of [`MiniLLMTrainer.score_rollouts`], with `faulty` `(B,)`.
        faults (`dict[int, str]`): explanations of the faulty rows, which have a NaN or infinite number.
        baseline ([`Totals`], *optional*): totals of the advantages for a metric of their baseline, if they have one.
    """

    batch: Batch
    faults: dict[int, str]
    baseline: Totals | None


def make_scorer(args: MiniLLMConfig, temperature: float, vocab_size: int, student_top_k: int) -> RolloutScorer:
    """Return what scores the rollouts of a run; `student_top_k` is the number of tokens that the teacher asks for."""
    expected_reward = None
    if args.reward_estimator == "expected":
        expected_reward = partial(expected_rewards, scale=args.reward_scale, clip=args.reward_clip)
    kd_temperature = args.kd_temperature or temperature
    entropy = args.top_entropy_quantile < 1.0
    return RolloutScorer(temperature, kd_temperature, vocab_size, expected_reward, entropy, student_top_k)


class RolloutScoring:
    """Score rollouts from the hidden states of sampling, or by a forward pass of each model.

    Args:
        args ([`MiniLLMConfig`]): arguments of the run.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        teacher ([`Teacher`]): the teacher.
        scorer ([`RolloutScorer`]): computes scores from hidden states.
        advantages ([`RolloutAdvantages`]): computes advantages from rewards.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): names the tokens of faults.

    Attributes:
        spans ([`CrossTokenizerScorer`], *optional*): scores the teacher instead if it has another tokenizer.
    """

    def __init__(
        self,
        args: MiniLLMConfig,
        accelerator: Accelerator,
        teacher: Teacher,
        scorer: RolloutScorer,
        advantages: RolloutAdvantages,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.args = args
        self.accelerator = accelerator
        self.teacher = teacher
        self.scorer = scorer
        self.advantages = advantages
        self.tokenizer = tokenizer
        self.spans: CrossTokenizerScorer | None = None

    def training_batch(
        self,
        model: torch.nn.Module,
        batch: Batch,
        alpha: float,
        behavior_logps: torch.Tensor | None = None,
        baseline: str = "none",
        sampled: ScoredRows | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> ScoredBatch:
        """Compute rewards, advantages and importance weights of completions.

        Args:
            model (`torch.nn.Module`): the student, with its current weights.
            batch (`dict` of `torch.Tensor`): prompts and completions.
            alpha (`float`): the teacher's share in the mixture that sampled.
            behavior_logps (`torch.Tensor` of shape `(B, T)`, *optional*): log-probs under another policy that sampled.
            baseline (`str`): "none", "position" or "group".
            sampled ([`ScoredRows`], *optional*): scores that sampling computed.
            prompts (`Sequence`, *optional*): the prompts, for a teacher with another tokenizer.
        """
        mask, spans, lengths = sequences(batch)[2], None, None
        scores = self.of_rollout(model, batch, ScoredRows() if sampled is None else sampled)
        if self.spans is not None:
            assert scores.student_kd_logps is not None
            spans = self.spans.score(batch, scores.student_kd_logps, prompts)
            scores = scores._replace(teacher_logps=spans.teacher, teacher_kd_logps=spans.teacher)
            scores = scores._replace(student_kd_logps=spans.student)
            lengths = spans.lengths
        assert scores.student_logps is not None  # as the other log-probs: scores of both models have them
        assert scores.teacher_logps is not None
        assert scores.student_kd_logps is not None
        assert scores.teacher_kd_logps is not None
        kd_logps = scores.teacher_kd_logps, scores.student_kd_logps
        rewards = token_rewards(*kd_logps, mask, self.args.reward_scale, self.args.reward_clip, lengths)
        if behavior_logps is None:
            behavior_logps = mixture_logps(scores.student_logps, scores.teacher_logps, alpha)
        long_term_weights, single_step_weights = importance_weights(
            scores.student_logps, behavior_logps, mask, self.args.importance_weighting, self.args.importance_weight_cap
        )
        # check log-probs, not rewards: the clip hides that the teacher gives a sampled token probability zero
        faults = explain_faults(
            *kd_logps, long_term_weights, mask, batch["completion_ids"], self.tokenizer, scores.expected_rewards
        )
        if spans is not None:
            faults |= spans.faults
        faulty = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        faulty[list(faults)] = True
        advantages, of_baseline = self.advantages.of_teacher(rewards, scores.expected_rewards, mask, faulty, baseline)
        batch = {
            **batch,
            "faulty": faulty,
            "advantages": advantages,
            "old_per_token_logps": behavior_logps.detach(),
            "student_logps": scores.student_logps,
            "long_term_weights": long_term_weights,
            "single_step_weights": single_step_weights,
            **self.advantages.token_weights(rewards, scores.entropy, mask, faulty),
        }
        if spans is not None:
            batch["sampled_reverse_kl"] = (spans.student - spans.teacher).masked_fill(faulty[:, None], 0.0)
        if scores.teacher_hidden_states is not None:
            batch["teacher_hidden_states"] = scores.teacher_hidden_states
        return ScoredBatch(batch, faults, of_baseline)

    def of_rollout(self, model: torch.nn.Module, batch: Batch, sampled: ScoredRows) -> RolloutScores:
        """Return the scores of both models, from sampling if it computed them, else from a pass of each model.

        Args:
            model (`torch.nn.Module`): the student, with its current weights.
            batch (`dict` of `torch.Tensor`): prompts and completions.
            sampled ([`ScoredRows`]): scores that sampling computed.
        """
        input_ids, attention_mask, mask = sequences(batch)
        scores = sampled.assemble(mask.shape)
        if scores.student_logps is None:
            scores = self.of_student(model, input_ids, attention_mask, mask, batch.get("teacher_index"))
        scores = self.add_teacher(batch, scores)
        self.teacher.raise_failures()
        return scores

    def add_teacher(self, batch: Batch, scores: RolloutScores) -> RolloutScores:
        """Return the scores with those of a teacher that reads the student's tokens, after a pass if they lack them.

        Args:
            batch (`dict` of `torch.Tensor`): prompts and completions.
            scores ([`RolloutScores`]): those of the student at least.
        """
        if scores.teacher_logps is not None or self.spans is not None:
            return scores
        input_ids, attention_mask, mask = sequences(batch)
        states = self.teacher.hidden_states(
            input_ids, attention_mask, mask.shape[1], scores.student_top_ids, batch.get("teacher_index")
        )
        of_teacher = TeacherStates(states, self.teacher.head_on(states.device))
        with autocast_on(states.device, self.accelerator):
            teacher = self.scorer.score(batch["completion_ids"], mask, teacher=of_teacher)
        return scores._replace(
            teacher_logps=teacher.teacher_logps,
            teacher_kd_logps=teacher.teacher_kd_logps,
            teacher_hidden_states=self.teacher.keep(states),
        )

    def sample_ahead(self, sampler: RolloutSampler, student: PreTrainedModel, turn: Turn) -> SampledTurn:
        """Sample a rollout in a thread, and score it; a teacher on a server is asked when the rollout is due.

        If its servers fail then, the run stops with a checkpoint that has the samples.

        Args:
            sampler ([`RolloutSampler`]): with the way of mixing.
            student ([`~transformers.PreTrainedModel`]): a copy that no update changes.
            turn ([`Turn`]): prompts and random numbers.
        """
        sampled = turn.sample(sampler, student)
        if self.teacher.is_served:
            return sampled
        batch = turn.batch(sampled.completions, sampler.pad_token_id, student.device)
        scores = self.add_teacher(batch, sampled.scores.assemble(batch["completion_mask"].shape))
        return sampled._replace(scores=ScoredRows([(list(range(len(turn.keys))), scores)]))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that a teacher with another tokenizer can read prompts; the others read the student's tokens.

        Raises:
            UserError: naming the first prompt that it cannot read.
        """
        if self.spans is not None:
            self.spans.check_prompts(prompts)

    def teacher_states(self, batch: Batch) -> torch.Tensor | None:
        """Return the teacher's states of a batch's completions `(B, T, H)`; None if it has other tokens."""
        return self.teacher.hidden_states_of(batch) if self.spans is None else None

    def of_student(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
        teacher_index: torch.Tensor | None = None,
    ) -> RolloutScores:
        """Score by a pass of the student, after a pass of the teacher if the rewards need both distributions."""
        check_completion_ids(input_ids[:, -mask.shape[1] :], mask, self.scorer.vocab_size)
        states = None
        if self.scorer.expected_reward is not None:
            top_ids = None
            if self.teacher.student_top_k:  # the student has to list its tokens before the teacher can be asked
                lister = replace(self.scorer, expected_reward=None, measure_entropy=False)
                listing = RolloutRequest(input_ids, attention_mask, mask, lister)
                top_ids = self.without_gradient(model, listing).student_top_ids
            states = self.teacher.hidden_states(input_ids, attention_mask, mask.shape[1], top_ids, teacher_index)
        request = RolloutRequest(input_ids, attention_mask, mask, self.scorer, states)
        scores = self.without_gradient(model, request)
        return scores._replace(teacher_hidden_states=self.teacher.keep(states))

    def answer(self, model: torch.nn.Module, *requests: ScoreRequest | RolloutRequest) -> list[Any]:
        """Answer the requests in one forward pass of `model`."""
        with self.accelerator.autocast():
            return model(score_requests=requests)

    @torch.no_grad()
    def without_gradient(self, model: Any, request: ScoreRequest | RolloutRequest) -> Any:
        """Score under the current weights of `model`, without dropout, in parts of a training micro-batch's size."""
        training = model.training
        model.eval()
        states = request.teacher_hidden_states
        with disable_gradient_checkpointing(model, parsed_kwargs(self.args.gradient_checkpointing_kwargs)):
            batch_size, length = self.args.per_device_train_batch_size, request.completion_mask.shape[1]
            parts = []
            for rows, columns in parts_by_length(request.attention_mask, batch_size):
                end = length - (request.input_ids.shape[1] - columns.stop)
                part = request._replace(
                    input_ids=request.input_ids[rows, columns],
                    attention_mask=request.attention_mask[rows, columns],
                    completion_mask=request.completion_mask[rows, :end],
                    teacher_hidden_states=None if states is None else states[rows, :end],
                )
                parts.append((rows.tolist(), self.answer(model, part)[0]))
        model.train(training)
        return assemble_fields(parts, request.completion_mask.shape)
