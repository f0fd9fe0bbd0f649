"""`TeacherMixedTrainer`: a `GRPOTrainer` that samples from teacher and student, and scores both models in chunks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation

from ..hardware.precision import OverflowCounter, configure_wrappers, half_precision
from ..masking import normalize_loss
from ..models.attention import avoid_cudnn_attention
from ..models.context import max_context, name_context
from ..models.forward_methods import rebind_fused_head
from ..models.fused_head import ScoreRequest, TokenScores, add_scoring
from ..models.init_kwargs import parsed_kwargs
from ..models.lm_head import LMHead, check_head
from ..models.student_copy import RolloutCopy, shards_student, student_of
from ..models.teacher import TeacherOffload, adapter_on_base, place_new_teacher, shared_vocab_size
from ..models.weight_formats import refuse_8bit_teacher
from ..monitoring.degeneration_watch import DegenerationWatch
from ..objectives import expected_rewards, importance_weights, mixture_logps, token_rewards
from ..rollouts.buffer import Batch, assemble_fields, fill_empty_completions, parts_by_length, sequences
from ..rollouts.decoding import CompiledDecoding, check_decoding
from ..rollouts.keyed_random import COINS, TRAIN_TOKENS, evaluation_key
from ..rollouts.rollout_sampler import RolloutSampler, ScoredRows
from ..rollouts.rollout_teacher import RolloutTeacher, Teacher
from ..rollouts.scores import RolloutRequest, RolloutScorer, RolloutScores, TeacherStates
from ..teacher_server.failed_rollout import saving_checkpoint
from ..teacher_server.remote_teacher import RemoteTeacher, ServedTeacher
from .checks import check_completion_ids
from .language_modeling import LanguageModelingBatches
from .logged_metrics import make_totals, token_totals
from .measured_rollouts import MeasuredRollouts
from .mixing_choice import MixingChoice
from .nonfinite_rows import explain_faults


class TeacherMixedTrainer(MeasuredRollouts):
    """Replace GRPO's generation, scoring, rewards and logs: all of [`MiniLLMTrainer`] except for the objective.

    A subclass calls `_add_teacher` at the end of its constructor.
    """

    _overflow_counter: OverflowCounter | None = None
    _rollout_copy: RolloutCopy | None = None
    _compiled_decoding: CompiledDecoding | None = None
    teacher_model: PreTrainedModel | None
    _teacher: Teacher

    def _add_teacher(self, teacher_model: str | PreTrainedModel | ServedTeacher) -> None:
        """Load and place the teacher, and prepare both models for sampling and for scoring in their forward passes.

        Raises:
            ValueError: if teacher and student do not match, or a head cannot be reproduced.
        """
        self._decodes_with_trl = self.use_vllm or bool(self.args.reshaping_fields())
        if self.rollout_func is not None:
            self.rollout_func = self._fill_empty_completions(self.rollout_func)
        self._order_callbacks()
        avoid_cudnn_attention()
        configure_wrappers(self.accelerator)
        half = half_precision(self.accelerator)
        # Sampling and the checks below need a complete student. Under DeepSpeed it is in half precision already.
        sharded = shards_student(self.accelerator)
        if sharded or (self.args.half_precision_rollouts and not self.is_deepspeed_enabled):
            self._rollout_copy = RolloutCopy(self._student, half, sharded)
        student = self._student if self._rollout_copy is None else self._rollout_copy.model
        self._teacher_phase: AbstractContextManager = nullcontext()
        if isinstance(teacher_model, ServedTeacher):
            self._use_served(teacher_model, student)
        else:
            self._use_local(teacher_model, student, half or torch.float32)
        # whether all processes take part in a turn if one does
        self._collective_turns = not self._decodes_with_trl and (sharded or self._teacher.is_sharded)
        self._scorer = self._make_scorer()
        self._mixing = MixingChoice(self.args.mixing, self.accelerator, self._teacher.is_sharded)
        self._add_scoring(student)
        self._prepare_decoding(student)

    def _use_local(self, teacher_model: str | PreTrainedModel, student: PreTrainedModel, dtype: torch.dtype) -> None:
        """Load and place a teacher in this process, and find what it shares with the student."""
        self.teacher_model = teacher = self._load_teacher(teacher_model, dtype)
        is_8bit = getattr(teacher, "is_loaded_in_8bit", False)  # also if its files are, or the caller's
        refuse_8bit_teacher(is_8bit, self.args.teacher_mixed_alpha)
        check_head(teacher, "teacher")
        self.vocab_size = shared_vocab_size(student, teacher, self._tokenizer)
        self.max_context = max_context(student, teacher)
        self._context_name = name_context(student, teacher)
        self._teacher = RolloutTeacher(
            teacher,
            LMHead.of(teacher).frozen(self.accelerator.device),
            self.accelerator,
            batch_size=self.args.per_device_train_batch_size,
            kept_on=self.args.teacher_hidden_states,
        )
        if self.args.offload_teacher:
            self._teacher_phase = TeacherOffload(teacher)

    def _use_served(self, served: ServedTeacher, student: PreTrainedModel) -> None:
        """Find what a teacher on servers shares with the student."""
        self.teacher_model = None
        self.vocab_size = served.shared_vocab_size(student, self._tokenizer)
        self.max_context = served.max_context(student)
        self._context_name = name_context(student)
        self._teacher = RemoteTeacher(
            served, served.scoring(self.vocab_size), self.accelerator, self.args.teacher_hidden_states
        )

    def _order_callbacks(self) -> None:
        """Add the counter of float16 overflows, and move the watch to the front."""
        # findings of the watch are logged, so it has to run before the callbacks that report logs
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, DegenerationWatch))
        if half_precision(self.accelerator) is torch.float16:
            self._overflow_counter = OverflowCounter(self.accelerator, lambda: self._nonfinite_in_row > 0)
            self.add_callback(self._overflow_counter)

    def _add_scoring(self, student: PreTrainedModel) -> None:
        """Check the student's LM head, and add scoring to its forward pass."""
        check_head(student, "student")
        rebind_fused_head(self._student)
        add_scoring(self._student, self.vocab_size, self._teacher.head)
        if self.ref_model is not None:
            add_scoring(self.accelerator.unwrap_model(self.ref_model), self.vocab_size)

    def _prepare_decoding(self, student: PreTrainedModel) -> None:
        """Check that the models can be decoded with a cache, and compile the student's steps on request."""
        if not self._decodes_with_trl and (self.rollout_func is None or self.tools):
            static = CompiledDecoding(student, "eager") if self.args.compile_rollouts else None
            check_decoding(student, "student", static)
            if self.args.teacher_mixed_alpha > 0 and self.teacher_model is not None:
                check_decoding(self.teacher_model, "teacher")
        if self.args.compile_rollouts:
            self._compiled_decoding = CompiledDecoding(student, self.args.compile_rollouts)
        elif self._rollout_copy is not None:  # compiled code would need the copy's weights at their addresses
            self._rollout_copy.release()

    def _make_scorer(self) -> RolloutScorer:
        expected_reward = None
        if self.args.reward_estimator == "expected":
            expected_reward = partial(expected_rewards, scale=self.args.reward_scale, clip=self.args.reward_clip)
        kd_temperature = self.args.kd_temperature or self.temperature
        entropy = self.args.top_entropy_quantile < 1.0
        return RolloutScorer(self.temperature, kd_temperature, self.vocab_size, expected_reward, entropy)

    def _load_teacher(self, teacher_model: str | PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        if self.args.teacher_shares_base:
            return adapter_on_base(self.accelerator.unwrap_model(self.model), teacher_model)
        return place_new_teacher(
            teacher_model,
            self.accelerator,
            init_kwargs=parsed_kwargs(self.args.teacher_model_init_kwargs),
            default_dtype=dtype,
            shard=self.args.shard_teacher,
            trust_remote_code=self.args.trust_remote_code,
            allow_pickled_weights=self.args.allow_pickled_weights,
        )

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

    def _turn_budget(self, prompt_ids: list[list[int]]) -> int | None:
        """Return the token limit of a turn, the same on all processes; None if no process has prompts."""
        horizon = self._horizon
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
        sampler = self._make_sampler()  # first, as the next lines switch the student to eval mode
        keys, coin_key = self._turn_keys(prompt_ids, rollout.turn)
        first_turn = rollout.turn == 0  # later turns follow answers of tools
        rollout.turn += 1
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=False,
                gradient_checkpointing_kwargs=parsed_kwargs(self.args.gradient_checkpointing_kwargs),
            ),
            self._sampling_model() as student,
        ):
            sampler = self._mixing.applied_to(sampler, student, prompt_ids, max_new_tokens)
            sampled = sampler.sample(student, prompt_ids, keys, coin_key, max_new_tokens, first_turn, rollout.given)
        rollout.scores = sampled.scores
        return sampled.completions

    def _make_sampler(self) -> RolloutSampler:
        """Return the sampler of a turn; an evaluation samples from the student alone."""
        mixes = self.model.training and self.rollout_func is None
        return RolloutSampler(
            self._teacher,
            self._scorer,
            alpha=self.args.teacher_mixed_alpha if mixes else 0.0,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            batch_size=self.args.sampling_batch_size,
            shared_coins=self.args.shared_coins,
            compiled=self._compiled_decoding,
            on_every_process=self._on_every_process if self._teacher.is_sharded else None,
            skd_top_k=self.args.skd_top_k if mixes else None,
        )

    def _turn_keys(self, prompt_ids: list[list[int]], turn: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """Return the keys of the random numbers of a turn: a key for the tokens of each row, and one for the coins."""
        seed, step, process = self.args.seed, self.state.global_step, self.accelerator.process_index
        keys: list[tuple[int, ...]]
        if self.model.training:
            first_row = process * self.args.per_device_train_batch_size * self._steps_per_generation
            keys = [(seed, TRAIN_TOKENS, step, first_row + row, turn) for row in range(len(prompt_ids))]
        else:
            first_row = process * self.args.eval_batch_size
            keys = [
                evaluation_key(seed, ids, (first_row + row) % self.num_generations_eval, turn)
                for row, ids in enumerate(prompt_ids)
            ]
        if not self.args.shared_coins:  # the keys of the rows complete it
            return keys, (seed, COINS)
        # all processes call a sharded teacher at the same time, so they share their coins
        group = 0 if self._teacher.is_sharded else process
        return keys, (seed, COINS, step, group, turn + 1)

    @property
    def _grpo_scores_rollouts(self) -> bool:
        """Return whether GRPO requests the log-probs of a rollout's tokens under the student that sampled them."""
        generate_every = self._steps_per_generation * self.num_iterations
        corrects_vllm = self.use_vllm and self.vllm_importance_sampling_correction
        return corrects_vllm or self.args.gradient_accumulation_steps % generate_every != 0

    @contextmanager
    def _sampling_model(self) -> Iterator[PreTrainedModel]:
        """Yield the student in eval mode, or its copy with the current weights."""
        if self._rollout_copy is not None:
            self._rollout_copy.refresh(self._student)
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

    def _saved_before_rollout(self) -> AbstractContextManager:
        is_remote, is_resumed = isinstance(self._teacher, RemoteTeacher), self._buffered_inputs is None
        # without its buffer, a run has just started or resumed, and there is nothing to save
        return saving_checkpoint(self) if is_remote and not is_resumed else nullcontext()

    # Scoring

    def _score_rollouts(
        self,
        batch: Batch,
        alpha: float,
        behavior_logps: torch.Tensor | None = None,
        baseline: str = "none",
        sampled: ScoredRows | None = None,
        log: bool = False,
    ) -> tuple[Batch, dict[int, str]]:
        """Return the training batch, and explanations of its `faulty` rows, which have a NaN or infinite number."""
        mask = sequences(batch)[2]
        check_completion_ids(batch["completion_ids"], mask, self.vocab_size)
        scores = self._score_rollout(batch, ScoredRows() if sampled is None else sampled)
        assert scores.student_logps is not None  # as the other log-probs: scores of both models have them
        assert scores.teacher_logps is not None
        assert scores.student_kd_logps is not None
        assert scores.teacher_kd_logps is not None
        kd_logps = scores.teacher_kd_logps, scores.student_kd_logps
        rewards = token_rewards(*kd_logps, mask, self.args.reward_scale, self.args.reward_clip)
        if behavior_logps is None:
            behavior_logps = mixture_logps(scores.student_logps, scores.teacher_logps, alpha)
        long_term_weights, single_step_weights = importance_weights(
            scores.student_logps, behavior_logps, mask, self.args.importance_weighting, self.args.importance_weight_cap
        )
        # check log-probs, not rewards: the clip hides that the teacher gives a sampled token probability zero
        faults = explain_faults(
            *kd_logps, long_term_weights, mask, batch["completion_ids"], self._tokenizer, scores.expected_rewards
        )
        faulty = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        faulty[list(faults)] = True
        batch = {
            **batch,
            "faulty": faulty,
            "advantages": self._advantages(rewards, scores.expected_rewards, mask, faulty, baseline, log),
            "old_per_token_logps": behavior_logps.detach(),
            "student_logps": scores.student_logps,
            "long_term_weights": long_term_weights,
            "single_step_weights": single_step_weights,
            **self._token_weights(rewards, scores.entropy, mask, faulty),
        }
        if scores.teacher_hidden_states is not None:
            batch["teacher_hidden_states"] = scores.teacher_hidden_states
        return batch, faults

    def _score_rollout(self, batch: Batch, sampled: ScoredRows) -> RolloutScores:
        """Return the scores of both models, from sampling if it computed them, else from a pass of each model."""
        input_ids, attention_mask, mask = sequences(batch)
        scores = sampled.assemble(mask.shape)
        if scores.student_logps is None:
            scores = self._score_student(input_ids, attention_mask, mask)
        if scores.teacher_logps is None:
            states = self._teacher.hidden_states(input_ids, attention_mask, mask.shape[1])
            with self.accelerator.autocast():
                teacher = self._scorer.score(
                    batch["completion_ids"], mask, teacher=TeacherStates(states, self._teacher.head)
                )
            scores = scores._replace(
                teacher_logps=teacher.teacher_logps,
                teacher_kd_logps=teacher.teacher_kd_logps,
                teacher_hidden_states=self._teacher.keep(states),
            )
        return scores

    def _score_student(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor
    ) -> RolloutScores:
        """Score by a pass of the student, after a pass of the teacher if the rewards need both distributions."""
        states = None
        if self._scorer.expected_reward is not None:
            states = self._teacher.hidden_states(input_ids, attention_mask, mask.shape[1])
        request = RolloutRequest(input_ids, attention_mask, mask, self._scorer, states)
        scores = self._score_without_gradient(self.model, request)
        return scores._replace(teacher_hidden_states=self._teacher.keep(states))

    def _old_logps(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the student's log-probs of the rollout in progress, and keep them for scoring it."""
        scores = self._rollout.scores
        if not scores.parts:
            scores.parts.append((list(range(len(mask))), self._score_student(input_ids, attention_mask, mask)))
        return scores.field("student_logps", mask.shape)

    def _score(self, model, *requests: ScoreRequest | RolloutRequest) -> list[Any]:
        """Answer the requests in one forward pass of `model`."""
        with self.accelerator.autocast():
            return model(score_requests=requests)

    @torch.no_grad()
    def _score_without_gradient(self, model, request: ScoreRequest | RolloutRequest) -> Any:
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
                parts.append((rows.tolist(), self._score(model, part)[0]))
        model.train(training)
        return assemble_fields(parts, request.completion_mask.shape)

    def _log_rollouts(self, inputs: list[dict[str, Any]], batch: Batch) -> None:
        super()._log_rollouts(inputs, batch)
        if self._compiled_decoding is not None:
            counts = self._compiled_decoding.take_counts()
            self._log_totals(make_totals({"rollout/compiled_steps": counts}, self.accelerator.device))

    # Loss

    def _make_lm_batches(self, lm_dataset: Dataset | IterableDataset) -> LanguageModelingBatches:
        args = self.args
        return LanguageModelingBatches(
            lm_dataset,
            self._tokenizer,
            max_length=min(args.lm_max_length, self.max_context or args.lm_max_length),
            batch_size=args.lm_batch_size or args.per_device_train_batch_size,
            seed=args.seed,
            chat_template_kwargs=parsed_kwargs(self.chat_template_kwargs),
        )

    def _lm_loss(self, lm: Batch, scores: TokenScores) -> torch.Tensor:
        """Log the terms of L_PT of a micro-batch, and return its share of the loss."""
        assert scores.loss is not None  # the request had a loss
        values = {"objective/lm_cross_entropy": -scores.logps}
        if scores.divergence is not None:
            values["objective/lm_forward_kl"] = scores.divergence
        self._log_totals(token_totals(values, lm["loss_mask"]))
        return normalize_loss(scores.loss, lm["window_tokens"] / self.accelerator.num_processes)
