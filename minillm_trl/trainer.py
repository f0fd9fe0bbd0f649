r"""`MiniLLMTrainer`: MiniLLM (arXiv 2306.08543) as TRL's `GRPOTrainer` with another sampler, advantage and loss.

The student samples completions. Its reward for each token is how much more likely the token is under the teacher than
under the student. This minimises the reverse KL of student to teacher, whose gradient has two terms at each token t
(Eq. 3):

    single step    grad KL(q(. | y_<t) || p(. | y_<t)), exact over the vocabulary
    long term      -R_{t+1} grad log q(y_t | y_<t), where R_{t+1} sums log p - log q over the tokens after t

The steps, and their modules:

    1. sample      a coin decides for each token whether student or teacher draws it (Eq. 4): `rollouts/sampling.py`
    2. score       log-probs under both models, from the hidden states of sampling: `rollouts/scores.py`
    3. weigh       rewards, returns (Eq. 6) and importance weights (Eq. 5), all without gradient: `objectives.py`
    4. shuffle     rows into optimizer steps and micro-batches, for every pass: `rollouts/buffer.py`
    5. update      both terms at each token, clipped, and L_PT: `loss.py`, `objectives.py`,
                   `training/language_modeling.py`

Differences from GRPO:

    1. Advantages belong to tokens and come from the teacher. Advantages of reward functions, if any, are added.
    2. The sampling policy is a mixture with the teacher, and the clipped ratio is relative to this mixture.
    3. One completion per prompt is enough (`num_generations=1`). Group baselines are optional (`advantage_baseline`).
    4. The loss adds the single step to the clipped long term.
    5. The loss is a mean over the tokens of an optimizer step on all processes (`loss_reduction`).
    6. Logits exist for a chunk of tokens at a time, never for whole sequences.
    7. Completions and optimizer steps with NaN or infinite numbers are left out and reported.

Differences from the paper, by default:

    1. The single step has no importance weight, as in the authors' code. This changes only its variance.
    2. The loss is the mean over tokens, as in the authors' code; `loss_reduction="sequence_sum"` is the paper's.
    3. A return is divided by the number of its summands (T - t), where Eq. 6 has T - t - 1.
    4. Completions decoded together share coins (`shared_coins`): each follows the mixture, but depends on others.
    5. L_PT requires an `lm_dataset`.

`docs/method.md` has the equations. The overrides of TRL below all begin with a comment on TRL's own implementation.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from .config import MiniLLMConfig
from .loss import LOSS_INPUTS, LOSS_OPTIONS, loss_of_tokens, loss_terms
from .masking import normalize_loss
from .models.encoding import added_tokens, without_extra_tokens
from .models.fused_head import ScoreRequest
from .rollouts.buffer import Batch, sequences
from .training.checks import check_arguments, check_groups, check_machine, check_prompt_ids, check_rollout_logps
from .training.evaluation_rows import fill_rows
from .training.language_modeling import language_modeling_request
from .training.model_card import PAPER
from .training.nonfinite_rows import explain_empty_step, explain_loss, explain_values, trained_rows, warn_of_faults
from .training.prompt_order import EpochRepeatSampler, mark_filler, split_columns
from .training.rollout_buffer import loss_normalizer
from .training.rollout_in_progress import RolloutInProgress
from .training.teacher_choice import choose_teacher, given_teachers, index_entry
from .training.teacher_mixed_trainer import TeacherMixedTrainer


class MiniLLMTrainer(TeacherMixedTrainer):
    r"""Distil a teacher into a student by minimising the reverse KL on the student's own samples (arXiv 2306.08543).

    Prompts, rollout reuse (`steps_per_generation`, `num_iterations`), reward functions and logging work as in
    [`~trl.GRPOTrainer`]; sampling, scoring and the loss are replaced.

    A rollout is scored from hidden states cached during sampling, so no model runs again (except, once, a teacher that
    did not sample). An inner pass runs one student forward and backward pass, and no teacher.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], or a `dict` of them, *optional*):
            The teacher, with the student's tokenizer or `cross_tokenizer`. It is frozen and put in eval mode. Settings
            that quantise or wrap the student do not apply to it. A `dict` has a teacher for each value of the
            dataset's `teacher_column`. None with `teacher_server_url` or `teachers`.
        reward_funcs (*optional*):
            Reward functions as in [`~trl.GRPOTrainer`], with relative weights `reward_weights`. Their advantage is
            added to the teacher's at every token, with weight 1. It is relative to the other completions of the
            prompt, or of the whole buffer if `num_generations` is 1.
        args ([`MiniLLMConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]; *optional* with an environment):
            Prompts in a column `prompt`, as texts or conversations.
        eval_dataset (*optional*):
            Prompts for evaluation. With a column `references` (list of texts) or `completion`, evaluation logs
            `eval_rouge_l`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of both models; loaded from the student's path by default.
        rollout_func (*optional*):
            As in [`~trl.GRPOTrainer`]. Its `logprobs` must be those of the policy that sampled; None means that the
            current student did. Its `env_mask` is 0 on tokens that are neither rewarded nor trained. An empty
            completion has no tokens to train, but counts as a completion.
        lm_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Corpus of the language-modelling loss (the paper's L_PT): a column `text`, or `prompt` and `completion`.
        reward_processing_classes, callbacks, optimizers, peft_config, quantization_config, tools, environment_factory
        (*optional*):
            As in [`~trl.GRPOTrainer`]. Answers of tools and environments are neither rewarded nor trained.

    Raises:
        ValueError: before any training, for a teacher with a different tokenizer, an LM head that cannot be
            reproduced, and settings without effect.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "minillm"]  # type: ignore[misc]  # TRL's own annotation forgets ClassVar
    _name = "MiniLLM"
    _paper = PAPER  # for model cards

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel | dict[str, str | PreTrainedModel] | None" = None,
        reward_funcs: Any = None,
        args: MiniLLMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        rollout_func: Callable | None = None,
        lm_dataset: Dataset | IterableDataset | None = None,
        quantization_config: Any = None,
        tools: list[Callable] | None = None,
        environment_factory: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = MiniLLMConfig(f"{name.rstrip('/').split('/')[-1]}-MiniLLM")
        teacher = choose_teacher(teacher_model, args)
        teacher_tokenizers = check_arguments(
            model,
            teacher,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            rollout_func,
            lm_dataset,
            has_environment=environment_factory is not None,
            peft_config=peft_config,
            tools=tools,
        )
        check_machine(args, quantization_config)
        super().__init__(
            model=model,
            teacher_model=teacher,
            teacher_tokenizers=teacher_tokenizers,
            lm_dataset=lm_dataset,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )

    # Scoring

    def score_rollouts(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        behavior_logps: torch.Tensor | None = None,
        teachers: list[str] | None = None,
    ) -> Batch:
        r"""Make a training batch from token ids, whether this trainer sampled them or not.

        Args:
            prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P)`): left-padded prompts.
            completion_ids, completion_mask (`torch.Tensor` of shape `(B, T)`): right-padded completions; the mask is
                non-zero up to and including the end-of-sequence token.
            behavior_logps (`torch.Tensor` of shape `(B, T)`, *optional*): log-probs under the policy that sampled, at
                the sampling temperature; by default under the mixture with `teacher_mixed_alpha`.
            teachers (`list[str]`, *optional*): the name of each row's teacher, if there are several.

        Returns:
            `dict` of detached tensors for `compute_loss`: the inputs; `advantages` (returns of the teacher's rewards,
            nats, less the baseline, if any, over these rows); `old_per_token_logps` (of the behavior policy);
            `student_logps` (of the current student); `long_term_weights` and `single_step_weights` (see
            [`objectives.importance_weights`]), all of shape `(B, T)`; and, unless they are recomputed,
            `teacher_hidden_states` of shape `(B, T, H)`.

        Raises:
            ValueError: if the baseline averages over groups, and the rows are not whole groups of `num_generations`.
            FloatingPointError: if the teacher or the student gives a sampled token probability zero or NaN, or an
                importance weight overflows. Training leaves such rows out of the update.
        """
        check_groups(self.args, len(prompt_ids), self.accelerator.num_processes)
        if self._overlap is not None:
            self._overlap.wait()  # its thread runs the teacher
        batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        batch |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
        batch |= index_entry(given_teachers(teachers, self._teacher_names, len(prompt_ids)), prompt_ids.device)
        with self._teacher_phase:
            scored = self.scoring.training_batch(
                self.model, batch, self.args.teacher_mixed_alpha, behavior_logps, self.args.advantage_baseline
            )
        for row, fault in scored.faults.items():
            raise FloatingPointError(f"Completion {row}: {fault}.")
        return scored.batch

    # Overrides of TRL: rollouts

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        # transformers: repeats the first rows in the last batch of an evaluation on several processes
        if not is_training:
            repeats = self.num_generations_eval
            dataset = fill_rows(dataset, batch_size, self.accelerator, self.args, mark_filler, repeats)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochRepeatSampler:
        # TRL: repeats prompts for groups and reused rollouts, in an order that depends on the epochs run so far
        return EpochRepeatSampler.of(super()._get_train_sampler(dataset))

    def _tokenize_prompts(self, prompts: list):
        # TRL: applies the chat template, and encodes; to texts, the tokenizer may add special tokens
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        if isinstance(prompts[0], str):
            prompt_ids = without_extra_tokens(prompt_ids, *added_tokens(self._tokenizer))
        check_prompt_ids(prompts, prompt_ids, self.max_completion_length, self.max_context, self._context_name)
        self.scoring.check_prompts(prompts)
        return prompt_ids, images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        # TRL: samples from the student with `generate` or vLLM; also called for each turn after answers of tools
        if self._decodes_with_trl:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        budget = self._turn_budget(prompt_ids)
        assert budget is not None  # this process has prompts
        return self._sample_turn(prompt_ids, budget), None

    def _tool_call_loop(self, *args: Any):
        # TRL: calls tools and samples the next turns, on each process until its own completions contain no calls
        self._rollout.turn = 1  # also after a rollout function
        outputs = super()._tool_call_loop(*args)
        # a process without further tool calls takes part in the turns of other processes
        while self._collective_turns and (budget := self._turn_budget([])) is not None:
            self._sample_turn([], budget)
        return outputs

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused_multimodal_inputs
    ):
        # TRL: scores completions from complete logits, wrongly for left-padded GPT-2, as it passes no position_ids
        mask = attention_mask[:, -logits_to_keep:].bool()
        if self._rollout.wants_old_logps:
            self._rollout.wants_old_logps = False
            return self._old_logps(input_ids, attention_mask, mask), None, None
        scores = self.scoring.without_gradient(model, ScoreRequest(input_ids, attention_mask, mask, self.temperature))
        return scores.logps, scores.entropy, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL: calls the reward functions, and gathers their values from all processes
        if self.reward_funcs:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            rewards = torch.zeros(len(prompts) * self.accelerator.num_processes, 1, device=self.accelerator.device)
        return self._note_rewards(rewards)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        # TRL: samples, rewards, and computes an advantage for each completion
        with self._teacher_phase:
            return self._generate_and_score(inputs)

    def _generate_and_score(self, inputs: list[dict[str, Any]]) -> Batch:
        training = self.model.training
        prompt_index, are_real, inputs = split_columns(inputs)
        counts = torch.tensor(are_real, device=self.accelerator.device)
        rollout = self._begin_rollout(counts, inputs)
        output = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
        batch = {name: output[name] for name in names if name in output}
        batch["completion_mask"] = batch["completion_mask"] * counts[:, None]
        batch["completion_mask"][rollout.empty_rows] = 0
        batch |= index_entry(rollout.teacher_index, counts.device)
        alpha = self.args.teacher_mixed_alpha if training else 0.0
        # evaluation has no baseline: values would depend on the other rows of the batch
        baseline = self.args.advantage_baseline if training else "none"
        behavior_logps = None
        if self.rollout_func is not None:
            alpha = 0.0
            if not self.use_vllm:  # with vLLM, GRPO corrects the sampling mismatch with them
                behavior_logps = output.get("sampling_per_token_logps")
                check_rollout_logps(behavior_logps, sequences(batch)[2])
        batch, faults, of_baseline = self.scoring.training_batch(
            self.model, batch, alpha, behavior_logps, baseline, rollout.scores, [row["prompt"] for row in inputs]
        )
        if of_baseline is not None:
            self.means.add(self.mode, of_baseline)
        if self.reward_funcs:
            batch, infinite = self._add_reward_advantages(batch, output["advantages"])
            faults |= infinite
        batch["half"] = self.buffer.halves(len(batch["prompt_ids"]))
        batch["prompt_index"] = torch.tensor(prompt_index, device=batch["prompt_ids"].device)
        optional = ("importance_sampling_ratio", "ref_per_token_logps")
        batch |= {name: output[name] for name in optional if name in output}
        if not training:
            batch["counts"] = counts
            batch.pop("token_weights", None)
        faults |= explain_values(batch)
        batch["faulty"][list(faults)] = True
        warn_of_faults(faults, [row["prompt"] for row in inputs], prompt_index)
        self._log_rollouts(inputs, batch)
        self._rollout = RolloutInProgress(counts)  # frees the scores
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # TRL: samples when the buffer is used up, shuffles it, and returns its next micro-batch
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        step, accumulation = self.state.global_step, self.args.gradient_accumulation_steps
        micro_step, batch = self.buffer.next(step, partial(self._make_rollout, generation_batch))
        if self._lm_batches is None:
            return batch
        return {**batch, "lm": self._lm_batches.load(step, micro_step, accumulation, self.accelerator)}

    # Overrides of TRL: updates

    def _compute_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        # TRL: computes GRPO's loss from complete logits, normalised by tokens or rows
        counts = inputs.get("counts", ~inputs["faulty"])
        if self.model.training:
            self.guard.faults += explain_empty_step(inputs)
            inputs = trained_rows(inputs, self._tokenizer.pad_token_id)
        input_ids, attention_mask, mask = sequences(inputs)
        rollout = {name: inputs[name].expand(mask.shape) for name in LOSS_INPUTS if name in inputs}
        options = {name: getattr(self.args, name) for name in LOSS_OPTIONS}
        states = self.scoring.teacher_states(inputs)
        request = ScoreRequest(input_ids, attention_mask, mask, self.temperature, states, self.args.kd_temperature)
        request = request._replace(
            divergence=self.args.divergence(),
            loss=loss_of_tokens(rollout, options),
            half=inputs.get("half") if self.model.training else None,
            measure_reverse_kl=True,
        )
        requests = [request]
        if "lm" in inputs:
            with self.accelerator.autocast():
                requests.append(language_modeling_request(inputs["lm"], self.teacher_model, self.args.lm_kd_ratio))
        scores, *lm_scores = self.scoring.answer(model, *requests)
        with torch.no_grad():
            terms = loss_terms(rollout, scores, mask, **options)
        self.guard.faults += self.rollout_metrics.add_update(self.mode, terms, scores, inputs, mask, counts)
        loss = normalize_loss(scores.loss, loss_normalizer(inputs, mask, self.args.loss_reduction, self.accelerator))
        if lm_scores:
            loss = loss + self.args.lm_coef * self._lm_loss(inputs["lm"], *lm_scores)
        if not self.model.training:
            return loss
        return self.guard.check_loss(loss, partial(explain_loss, batch=inputs), self._deepspeed_engine)

    # Overrides of TRL: runs

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as [`ReliableTrainer`] does, after checking that all prompts leave room for their completions."""
        # TRL: inherits the loop of transformers' Trainer
        self._check_prompt_lengths()
        with self._overlap or nullcontext():
            return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of completions left out and, in float16, of steps that overflowed."""
        # TRL: adds the means of its metrics, and prints completions of the last rollout, also at the end of a run
        if "loss" in logs:
            logs = {**logs, **self.counts.metrics(self.model_wrapped)}
        if not self.model.training:
            self.rollout_metrics.finish_eval_rewards()
        wanted, step = self.log_completions, self.state.global_step
        self.log_completions = wanted and not ("train_runtime" in logs and self.table.shown_at == step)
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
        self.table.shown_at = step
