"""`TeacherMixedTrainer`: a `GRPOTrainer` that samples from teacher and student, and scores both models in chunks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from ..config import MiniLLMConfig
from ..hardware.precision import OverflowCounter, configure_wrappers, half_precision, keep_adapters_in_float32
from ..masking import normalize_loss
from ..models.attention import avoid_cudnn_attention
from ..models.bitsandbytes_layout import keep_4bit_layout
from ..models.dropout import disable_dropout
from ..models.forward_methods import rebind_fused_head
from ..models.fused_head import TokenScores, add_scoring
from ..models.init_kwargs import parsed_kwargs
from ..models.lm_head import check_head
from ..models.student_copy import RolloutCopy, rollout_copy, shards_student, student_of
from ..monitoring.degeneration_watch import DegenerationWatch
from ..positions import rollout_horizon
from ..rollouts.buffer import Batch, fill_empty_completions
from ..rollouts.compiled_steps import CompiledDecoding
from ..rollouts.rollout_sampler import RolloutSampler, SampledTurn
from ..teacher_server.failed_rollout import saving_checkpoint
from ..teacher_server.stored import OfflineTeacher
from .checks import check_model
from .decoding_setup import prepare_decoding
from .ends_of_run import settle_ends
from .given_completions import given_completions
from .language_modeling import lm_batches
from .logged_metrics import make_totals, token_totals
from .mixing_choice import MixingChoice
from .overlapped_rollouts import OverlappedRollouts, overlapped_rollouts
from .prompt_order import number_prompts
from .reliable_trainer import ReliableTrainer
from .rollout_buffer import RolloutBuffer, RolloutCounts
from .rollout_device import rollout_device, training_on_one_device
from .rollout_in_progress import RolloutInProgress
from .rollout_metrics import CompletionTable, RolloutMetrics
from .rollout_rewards import FunctionRewards, RolloutAdvantages, placeholder_reward, remove_placeholder
from .rollout_scoring import RolloutScoring, make_scorer
from .run_settings import describe_dataset, describe_teachers, teacher_digest
from .teacher_choice import GivenTeachers, declared_by, row_teachers
from .teacher_setup import use_own_tokenizer, use_teachers
from .turns import Turn, make_turn, next_turn
from .vllm_drafts import update_vllm, vllm_drafts


class TeacherMixedTrainer(ReliableTrainer, GRPOTrainer):
    """Sample from the mixture of student and teacher, and score both models.

    [`MiniLLMTrainer`] is this trainer with the methods of TRL that call the ones here.

    Args:
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`ServedTeacher`], or a `dict` of them): the teacher
            or, by name, several ones.
        teacher_tokenizers (`list[PreTrainedTokenizerBase]`): the tokenizers of the teachers, as far as known.
        lm_dataset (*optional*): corpus of the language-modelling loss.
        reward_funcs, train_dataset, arguments: as in [`~trl.GRPOTrainer`].
    """

    # GRPOTrainer fills these in from its arguments, which annotate them as optional
    args: MiniLLMConfig
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    _logs: dict[str, Any]  # GRPO's table of completions, by column
    teacher_model: PreTrainedModel | None

    def __init__(
        self,
        *,
        teacher_model: GivenTeachers,
        teacher_tokenizers: list[PreTrainedTokenizerBase],
        lm_dataset: Dataset | IterableDataset | None,
        reward_funcs: Any,
        train_dataset: Dataset | IterableDataset | None,
        **arguments: Any,
    ):
        no_reward_funcs = reward_funcs is None or reward_funcs == []
        # GRPOTrainer requires a reward function. Without one, pass a placeholder and remove it again.
        given = placeholder_reward if no_reward_funcs else reward_funcs
        # without a dataset, GRPOTrainer lets the environment bring the prompts
        numbered = None if train_dataset is None else number_prompts(train_dataset)
        with training_on_one_device(arguments["args"]):
            super().__init__(reward_funcs=given, train_dataset=numbered, **arguments)
        if no_reward_funcs:
            remove_placeholder(self)
        keep_4bit_layout(self.model)
        keep_adapters_in_float32(self.model)
        check_model(self, has_corpus=lm_dataset is not None)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        described = {"teacher_model": describe_teachers(teacher_model), "lm_dataset": describe_dataset(lm_dataset)}
        self._teacher_names = list(teacher_model) if isinstance(teacher_model, dict) else []
        self._rollout_copy: RolloutCopy | None = None
        self._compiled_decoding: CompiledDecoding | None = None
        self._overlap: OverlappedRollouts | None = None
        self._rollout = RolloutInProgress(torch.empty(0, dtype=torch.bool))  # replaced for each rollout
        self._add_parts(described)
        self._add_teacher(teacher_model)
        if self.args.cross_tokenizer:  # ends of the teacher are no ids of the student
            settle_ends(self, None, None)
            self.scoring.spans = use_own_tokenizer(self, *teacher_tokenizers)
        else:
            settle_ends(self, *declared_by(self._teacher, teacher_model, teacher_tokenizers))
        kwargs = parsed_kwargs(self.chat_template_kwargs)
        if isinstance(teacher_model, OfflineTeacher) and isinstance(self.train_dataset, Dataset):
            teacher_model.check_data(self.train_dataset, self._tokenizer, self.max_completion_length, kwargs)
        self._lm_batches = lm_batches(lm_dataset, self.args, self._tokenizer, self.max_context, kwargs)

    def _add_parts(self, described: dict[str, Any]) -> None:
        """Add the parts that hold rollouts and their metrics; `described` are teacher and corpus."""
        # findings of the watch are logged, so it has to run before the callbacks that report logs
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, DegenerationWatch))
        overflows = None
        if half_precision(self.accelerator) is torch.float16:
            overflows = OverflowCounter(self.accelerator, lambda: self.guard.skipped_in_row > 0)
            self.add_callback(overflows)
        self.counts = RolloutCounts(self.accelerator, overflows)
        self.buffer = RolloutBuffer(self.args, self.accelerator, teacher_digest(described["teacher_model"]))
        self.advantages = RolloutAdvantages(self.args, self.accelerator)
        self.table = CompletionTable(self._logs, self.accelerator, self.log_completions)
        self.rollout_metrics = RolloutMetrics(
            self.means,
            self._metrics,
            self.table,
            self.accelerator,
            self._tokenizer,
            {"train": self.num_generations, "eval": self.num_generations_eval},
            self.reward_func_names,
            self.reward_weights,
            of_sequences=self.args.loss_reduction == "sequence_sum",
            teacher_names=self._teacher_names,
        )
        self.settings.inputs |= {**described, "reward_funcs": list(self.reward_func_names)}
        self.resume.parts += [self.buffer, self.counts, self.table]

    def _add_teacher(self, teacher_model: GivenTeachers) -> None:
        """Load and place the teacher, and prepare both models for sampling and for scoring in their forward passes.

        Raises:
            ValueError: if teacher and student do not match, or a head cannot be reproduced.
        """
        self._drafts = vllm_drafts(self)
        self._decodes_with_trl = (self.use_vllm and self._drafts is None) or bool(self.args.reshaping_fields())
        if self.rollout_func is not None:
            self.rollout_func = self._fill_empty_completions(self.rollout_func)
        avoid_cudnn_attention()
        configure_wrappers(self.accelerator)
        # Sampling and the checks below need a complete student
        device, merges = rollout_device(self.args), not self._decodes_with_trl
        self._rollout_copy = rollout_copy(self._student, self.args, self.accelerator, merges, device)
        student = self._student if self._rollout_copy is None else self._rollout_copy.model
        base = self.accelerator.unwrap_model(self.model)
        found = use_teachers(teacher_model, student, base, self.args, self._tokenizer, self.accelerator, device)
        self._teacher, self._teacher_phase = found.teacher, found.phase
        self.teacher_model = found.teacher.model
        self.vocab_size, self.max_context, self._context_name = found.vocab_size, found.max_context, found.context_name
        # whether all processes take part in a turn if one does
        sharded = shards_student(self.accelerator) or self._teacher.is_sharded
        self._collective_turns = sharded and not self._decodes_with_trl
        mixing = self.args.mixing if self._drafts is None else "speculative"
        self._mixing = MixingChoice(mixing, self.accelerator, self._teacher.is_sharded)
        self.resume.parts.append(self._mixing)
        check_head(student, "student")
        rebind_fused_head(self._student)
        add_scoring(self._student, self.vocab_size, self._teacher.head)
        if self.ref_model is not None:
            add_scoring(self.accelerator.unwrap_model(self.ref_model), self.vocab_size)
        scorer = make_scorer(self.args, self.temperature, self.vocab_size, self._teacher.student_top_k)
        self.scoring = RolloutScoring(
            self.args, self.accelerator, self._teacher, scorer, self.advantages, self._tokenizer
        )
        self._prepare_decoding(student)
        self._overlap = overlapped_rollouts(self)
        self.resume.parts += [] if self._overlap is None else [self._overlap]

    def _prepare_decoding(self, student: PreTrainedModel) -> None:
        """Check that the models can be decoded with a cache, and compile their steps on request."""
        decodes = not self._decodes_with_trl and (self.rollout_func is None or bool(self.tools))
        self._compiled_decoding = prepare_decoding(student, self._teacher, self.args, decodes)
        if self._compiled_decoding is None and self._rollout_copy is not None:
            self._rollout_copy.release()  # compiled code would need its weights at their addresses

    @property
    def _student(self) -> PreTrainedModel:
        return student_of(self.model, self.accelerator)

    def _check_prompt_lengths(self) -> None:
        """Check that each prompt leaves room for its completion."""
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for dataset in (self.train_dataset, *datasets.values()):
            # Tools and environments extend prompts during a rollout, which checks them then. So it does for a stream.
            if self.max_context is not None and isinstance(dataset, Dataset) and not (self.tools or self.environments):
                for start in range(0, len(dataset), 1000):
                    self._tokenize_prompts(dataset[start : start + 1000]["prompt"])

    def _fill_empty_completions(self, rollout_func: Callable) -> Callable:
        """Wrap a rollout function to pad empty completions, and remember their rows."""

        def filled(prompts: list, trainer: "TeacherMixedTrainer") -> dict[str, Any]:
            output, self._rollout.empty_rows = fill_empty_completions(
                rollout_func(prompts, trainer), self._tokenizer.pad_token_id
            )
            return output

        return filled

    def _begin_rollout(self, counts: torch.Tensor, rows: Sequence[dict[str, Any]] = ()) -> RolloutInProgress:
        """Return the new rollout in progress, of rows of the dataset that count or not `(B,)`."""
        if self._drafts is not None:  # an evaluation has TRL's samples, with GRPO's correction of the mismatch
            self._decodes_with_trl = not self.model.training
            corrects = self.args.vllm_importance_sampling_correction and not self.model.training
            self.vllm_importance_sampling_correction = corrects
        self._rollout = RolloutInProgress(counts, self._grpo_scores_rollouts)
        self._rollout.given = given_completions(self, rows)
        self._rollout.teacher_index = row_teachers(rows, self.args.teacher_column, self._teacher_names)
        return self._rollout

    def _turn_budget(self, prompt_ids: list[list[int]]) -> int | None:
        """Return the token limit of a turn, the same on all processes; None if no process has prompts."""
        args, horizon = self.args, self.max_completion_length
        if self.model.training:  # evaluation has the whole one
            horizon = rollout_horizon(self.state.global_step, horizon, args.horizon_start, args.horizon_steps)
        if self._rollout.turn == 0:  # all processes have prompts, which were checked before
            return horizon
        budget, longest = horizon, max(map(len, prompt_ids), default=0)
        if self.max_context is not None:
            budget = max(min(budget, self.max_context - longest), 0)
        if not self._collective_turns:
            return budget
        own = torch.tensor([budget if prompt_ids else -1], device=self.accelerator.device)
        return min((value for value in self.accelerator.gather(own).tolist() if value >= 0), default=None)

    def _sample_turn(self, prompt_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Sample the completions of a turn; keep the scores of a first turn."""
        rollout = self._rollout
        first_turn = rollout.turn == 0  # later turns follow answers of tools
        numbers = rollout.teacher_index if first_turn else []  # later turns have other rows
        turn = make_turn(self, prompt_ids, max_new_tokens, self.state.global_step, rollout.turn, numbers)
        rollout.turn += 1
        sampled = self._overlap.take(turn) if self._overlap is not None and self.model.training else None
        if sampled is None:
            sampled = self._sample_now(turn, first_turn)
        rollout.scores = sampled.scores.to(self.accelerator.device, stay=self.buffer.kept_on_cpu)
        return sampled.completions

    def _sample_now(self, turn: Turn, with_scores: bool) -> SampledTurn:
        """Sample a turn from the student with its current weights."""
        sampler = self._make_sampler()  # first, as the next lines switch the student to eval mode
        if sampler.drafts is not None:
            update_vllm(self)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=False,
                gradient_checkpointing_kwargs=parsed_kwargs(self.args.gradient_checkpointing_kwargs),
            ),
            self._sampling_model() as student,
        ):
            sampler = self._mixing.applied_to(sampler, student, turn.prompt_ids, turn.max_new_tokens)
            return turn.sample(sampler, student, with_scores, self._rollout.given)

    def _make_sampler(self) -> RolloutSampler:
        """Return the sampler of a turn; an evaluation samples from the student alone."""
        mixes = self.model.training and self.rollout_func is None
        return RolloutSampler(
            self._teacher,
            self.scoring.scorer,
            alpha=self.args.teacher_mixed_alpha if mixes else 0.0,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            batch_size=self.args.sampling_batch_size,
            shared_coins=self.args.shared_coins,
            compiled=self._compiled_decoding,
            on_every_process=self._on_every_process if self._teacher.is_sharded else None,
            drafts=self._drafts if mixes else None,
            skd_top_k=self.args.skd_top_k if mixes else None,
        )

    @property
    def _grpo_scores_rollouts(self) -> bool:
        """Return whether GRPO requests the log-probs of a rollout's tokens under the student that sampled them."""
        generate_every = self.buffer.micro_batches * self.num_iterations
        corrects_vllm = self.use_vllm and self.vllm_importance_sampling_correction
        return corrects_vllm or self.args.gradient_accumulation_steps % generate_every != 0

    @contextmanager
    def _sampling_model(self) -> Iterator[PreTrainedModel]:
        """Yield the student in eval mode, or its copy with the current weights."""
        if self._overlap is not None:
            self._overlap.wait()  # for its copy, which this changes
        if self._rollout_copy is not None:
            self._rollout_copy.refresh(self._student)
            with self._rollout_copy.precision(self.accelerator):
                yield self._rollout_copy.model
            if self._compiled_decoding is None:
                self._rollout_copy.release()
            return
        training = self._student.training
        self._student.eval()
        with self.accelerator.autocast():
            yield self._student
        self._student.train(training)

    def _on_every_process(self, flag: bool) -> bool:
        """Return whether the flag is True on all processes."""
        flags = torch.tensor(int(flag), device=self.accelerator.device)
        return int(self.accelerator.reduce(flags, reduction="sum")) == self.accelerator.num_processes

    def _make_rollout(self, rows: list[dict[str, Any]]) -> Batch:
        """Return the scored rollout of a training; if the teacher's servers fail, save the run as it was before."""
        is_resumed = self.buffer.batches is None
        # without its buffer, a run has just started or resumed, and there is nothing to save
        with saving_checkpoint(self) if self._teacher.is_served and not is_resumed else nullcontext():
            batch: Any = self._generate_and_score_completions(rows)
        batch = self.counts.leave_out_faulty(batch)
        if self._overlap is not None and (turn := next_turn(self)) is not None:
            sampler = self._mixing.applied_to(
                self._make_sampler(), self._student, turn.prompt_ids, turn.max_new_tokens
            )
            self._overlap.start(self._student, turn, partial(self.scoring.sample_ahead, sampler))
        return batch

    # Scoring

    def _old_logps(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the student's log-probs of the rollout in progress, and keep them for scoring it."""
        scores = self._rollout.scores
        if not scores.parts:
            numbers = self._rollout.teacher_tensor()
            of_student = self.scoring.of_student(self.model, input_ids, attention_mask, mask, numbers)
            scores.parts.append((list(range(len(mask))), of_student))
        return scores.field("student_logps", mask.shape)

    def _log_rollouts(self, rows: list[dict[str, Any]], batch: Batch) -> None:
        """Log the metrics of the rollout in progress; `rows` are those of the dataset."""
        counts, rewards = self._rollout.counts, self._rollout.rewards.values
        self.rollout_metrics.add_rollout(self.mode, rows, batch, counts, rewards, self.eos_token_ids)
        if self._compiled_decoding is not None:
            steps = {"rollout/compiled_steps": self._compiled_decoding.take_counts()}
            self.means.add(self.mode, make_totals(steps, self.accelerator.device))
        for source in (self._drafts, self._overlap) if self.mode == "train" else ():
            if source is not None:
                self.means.add(self.mode, make_totals(source.take_totals(), self.accelerator.device))

    @property
    def rollout_seconds(self) -> float:
        """Return the time spent on training rollouts since the process started."""
        return self.buffer.seconds

    # Rewards of functions

    @property
    def _group(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _note_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Store and return rewards `(B_all, F)`, with infinite ones replaced, and NaN for rows that do not count."""
        if not self.model.training:  # NaN keeps fillers out of all means
            rewards = rewards.masked_fill(~self.accelerator.gather(self._rollout.counts)[:, None], torch.nan)
        self._rollout.rewards = FunctionRewards.of(rewards, self._group)
        return self._rollout.rewards.values

    def _add_reward_advantages(self, batch: Batch, group_advantages: torch.Tensor) -> tuple[Batch, dict[int, str]]:
        """Add GRPO's advantages of the reward functions; without groups, relative to the whole buffer instead.

        Completions with an infinite reward become faulty; also return their explanations, by row.
        """
        rewards, num_rows = self._rollout.rewards, len(group_advantages)
        faults = rewards.faults(self.accelerator.process_index * num_rows, num_rows, self.reward_func_names)
        batch["faulty"][list(faults)] = True
        if self._group == 1:
            group_advantages = self.advantages.of_buffer(rewards, self.reward_weights, num_rows)
        return {**batch, "advantages": batch["advantages"] + group_advantages[:, None]}, faults

    # Loss

    def _lm_loss(self, lm: Batch, scores: TokenScores) -> torch.Tensor:
        """Log the terms of L_PT of a micro-batch, and return its share of the loss."""
        assert scores.loss is not None  # the request had a loss
        values = {"objective/lm_cross_entropy": -scores.logps}
        if scores.divergence is not None:
            values["objective/lm_forward_kl"] = scores.divergence
        self.means.add(self.mode, token_totals(values, lm["loss_mask"]))
        return normalize_loss(scores.loss, lm["window_tokens"] / self.accelerator.num_processes)
