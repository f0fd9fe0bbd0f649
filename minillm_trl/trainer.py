"""`MiniLLMTrainer`: MiniLLM wired into TRL's `GRPOTrainer`. Formulas are in `objectives` and `fused_head`."""

import textwrap
import zlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from .checks import check_arguments, check_rewards
from .config import MiniLLMConfig
from .evaluation.metrics import repeated_ngrams, rouge_l
from .fused_head import ScoreRequest, TokenScores, add_scoring, check_head
from .masking import reduce_loss
from .objectives import clipped_policy_gradient_loss, mixture_logps, reward_to_go, token_rewards
from .rollouts import Batch, loss_metrics, loss_totals, window_token_counts
from .sampling import keyed_uniforms, sample_prompts
from .teacher import load_teacher, max_context, score_teacher, shared_vocab_size

# First element of the keys of stateless randomness, after the seed
_TRAIN_TOKENS, _EVAL_TOKENS, _COINS, _ORDER = range(4)


class MiniLLMTrainer(GRPOTrainer):
    r"""Distils a teacher into a student by minimising the reverse KL on the student's own samples (arXiv 2306.08543).

    A rollout is a GRPO rollout with token-level advantages whose behavior policy is the teacher-student mixture. From
    [`~trl.GRPOTrainer`] come prompts, rollout reuse (`steps_per_generation`, `num_iterations`), reward functions and
    logging; sampling, scoring and the loss are replaced. Tested with TRL 1.16; the private members relied on are
    pinned in
    `tests/test_trl_contract.py`.

    Per rollout: one generation, one teacher forward (log-probs of the sampled tokens, and hidden states kept for the
    inner passes), one student forward without gradient. Per inner pass: one student forward and backward.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            The teacher, with the student's tokenizer. It is frozen, put in eval mode and never quantised or wrapped
            for training because the student is.
        reward_funcs (*optional*):
            Reward functions as in [`~trl.GRPOTrainer`]. Their group-relative advantage is added to the teacher's at
            every token, so they need `num_generations` > 1.
        args ([`MiniLLMConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Has a column `prompt`: text, or a conversation.
        eval_dataset (*optional*):
            The same. With a column `references` (list of texts) or `completion` evaluation logs `eval_rouge_l`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of both; loaded from the student's path by default.
        reward_processing_classes, callbacks, optimizers, peft_config, rollout_func, quantization_config (*optional*):
            As in [`~trl.GRPOTrainer`].

    Raises:
        ValueError: for a teacher that does not share the student's tokenizer, an LM head that cannot be reproduced,
            and settings that have no meaning here; before any training.
    """

    _tag_names = ("trl", "minillm")
    _name = "MiniLLM"
    _paper = {  # noqa: RUF012 - overrides an attribute of GRPOTrainer
        "title": "MiniLLM: On-Policy Distillation of Large Language Models",
        "id": "2306.08543",
        "citation": textwrap.dedent("""\
            @inproceedings{gu2024minillm,
                title     = {{MiniLLM: Knowledge Distillation of Large Language Models}},
                author    = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
                booktitle = {The Twelfth International Conference on Learning Representations},
                year      = 2024,
                url       = {https://arxiv.org/abs/2306.08543},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel",
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
        quantization_config: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = MiniLLMConfig(f"{name.rstrip('/').split('/')[-1]}-MiniLLM")
        check_arguments(
            model, teacher_model, reward_funcs, args, train_dataset, eval_dataset, processing_class, rollout_func
        )
        has_reward_funcs = reward_funcs is not None and reward_funcs != []
        super().__init__(
            model=model,
            # GRPOTrainer insists on a reward source; ours is the teacher, and this one is dropped below
            reward_funcs=reward_funcs if has_reward_funcs else _teacher_is_the_reward,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            rollout_func=rollout_func,
        )
        if not has_reward_funcs:
            self.reward_funcs, self.reward_func_names, self.reward_processing_classes = [], [], []
        self._check_model()
        self._decodes_with_trl = args.use_vllm or bool(args.reshaping_fields())

        mixed_precision = {"fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = mixed_precision.get(self.accelerator.mixed_precision, torch.float32)
        teacher = load_teacher(teacher_model, args.teacher_model_init_kwargs, dtype)
        self.vocab_size = shared_vocab_size(self._student, teacher, self._tokenizer)
        self.teacher_model = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.max_context = max_context(self._student, teacher)
        check_head(self._student, "student")
        check_head(teacher, "teacher")
        add_scoring(self._student, self.vocab_size, teacher)

    def _check_model(self) -> None:
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("Vision-language students are not supported: the teacher is scored on text alone.")
        if self.aux_loss_enabled:
            raise ValueError(
                "Mixture-of-experts students with a router loss are not supported. Set output_router_logits or "
                "router_aux_loss_coef to 0 in the model's config to train without it."
            )
        sharded = self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        if sharded:
            raise ValueError("ZeRO-3 and FSDP are not supported yet: use DDP or ZeRO stage 1 or 2.")

    @property
    def _student(self) -> PreTrainedModel:
        """The student without wrappers; for adapters, the base model that they are injected into."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    # Sampling

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if len(ids) == 0:
                raise ValueError(
                    f"The prompt {prompt!r} has no tokens, so nothing predicts its completion's first token."
                )
            if self.max_context is not None and len(ids) + self.max_completion_length > self.max_context:
                raise ValueError(
                    f"A prompt of {len(ids)} tokens and max_completion_length={self.max_completion_length} exceed the "
                    f"models' context of {self.max_context}. Shorten or drop the prompt that begins with "
                    f"{str(prompt)[:80]!r}, or lower max_completion_length."
                )
        return prompt_ids, images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self._decodes_with_trl:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        training = self.model.training
        seed, step, process = self.args.seed, self.state.global_step, self.accelerator.process_index
        if training:
            keys = [(seed, _TRAIN_TOKENS, step, process * len(prompt_ids) + row) for row in range(len(prompt_ids))]
        else:  # the same numbers at every evaluation, so that curves differ by the student alone
            keys = [
                (seed, _EVAL_TOKENS, zlib.crc32(repr(ids).encode()), row % self.num_generations_eval)
                for row, ids in enumerate(prompt_ids)
            ]
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as student,
            self.accelerator.autocast(),
        ):
            student.eval()
            completions = sample_prompts(
                student,
                prompt_ids,
                keys=keys,
                max_new_tokens=self.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self._tokenizer.pad_token_id,
                temperature=self.temperature,
                batch_size=self.args.sampling_batch_size,
                teacher=self.teacher_model,
                alpha=self.args.teacher_mixed_alpha if training else 0.0,
                coin_key=(seed, _COINS, step, process),
                vocab_size=self.vocab_size,
            )
            student.train(training)
        return completions, None

    # Scoring

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **unused_multimodal_inputs
    ):
        # GRPO's version passes no position_ids, which scores left-padded GPT-2 wrongly
        mask = attention_mask[:, -logits_to_keep:].bool()
        scores = self._score_student(input_ids, attention_mask, mask, self.temperature)
        return scores.logps, scores.entropy, None

    def _score(self, model, input_ids, attention_mask, request: ScoreRequest) -> TokenScores:
        with self.accelerator.autocast():
            return model(input_ids=input_ids, attention_mask=attention_mask, score_request=request)

    @torch.no_grad()
    def _score_student(self, input_ids, attention_mask, mask, temperature: float) -> TokenScores:
        """Score under the student as it is now, without dropout, in parts of a training micro-batch."""
        training = self.model.training
        self.model.eval()
        parts = torch.arange(len(input_ids)).split(self.args.per_device_train_batch_size)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            scores = [
                self._score(self.model, input_ids[part], attention_mask[part], ScoreRequest(mask[part], temperature))
                for part in parts
            ]
        self.model.train(training)
        return TokenScores(torch.cat([s.logps for s in scores]), torch.cat([s.entropy for s in scores]), None)

    def score_rollouts(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        behavior_logps: torch.Tensor | None = None,
    ) -> Batch:
        r"""Make the training batch for given token ids, sampled here or elsewhere.

        Args:
            prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P)`): left-padded prompts.
            completion_ids, completion_mask (`torch.Tensor` of shape `(B, T)`): right-padded completions; the mask is
                non-zero up to and including the end-of-sequence token.
            behavior_logps (`torch.Tensor` of shape `(B, T)`, *optional*): log-probs under the policy that sampled, at
                the sampling temperature; those of the mixture at `teacher_mixed_alpha` if not given.

        Returns:
            `dict` of tensors for `compute_loss`, all detached: the inputs, `advantages` (return of the teacher's
            rewards, nats), `old_per_token_logps` (the behavior policy's), `student_logps` (of the student as it is
            now), all of shape `(B, T)`, and `teacher_hidden_states` of shape `(B, T, H)`.

        Raises:
            FloatingPointError: if the teacher or the student gives a sampled token probability zero or NaN.
        """
        if behavior_logps is None:
            return self._score_rollouts(
                prompt_ids, prompt_mask, completion_ids, completion_mask, self.args.teacher_mixed_alpha
            )
        batch = self._score_rollouts(prompt_ids, prompt_mask, completion_ids, completion_mask, alpha=0.0)
        return {**batch, "old_per_token_logps": behavior_logps.detach()}

    def _score_rollouts(
        self, prompt_ids, prompt_mask, completion_ids, completion_mask, alpha: float, student_logps=None
    ) -> Batch:
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()
        mask = completion_mask.bool()
        kd_temperature = self.args.kd_temperature or self.temperature
        with self.accelerator.autocast():
            teacher_logps, teacher_kd_logps, teacher_hidden_states = score_teacher(
                self.accelerator.unwrap_model(self.teacher_model),
                input_ids,
                attention_mask,
                mask,
                temperatures=(self.temperature, kd_temperature),
                vocab_size=self.vocab_size,
                batch_size=self.args.per_device_train_batch_size,
            )
        if student_logps is None:
            student_logps = self._score_student(input_ids, attention_mask, mask, self.temperature).logps
        student_kd_logps = student_logps
        if kd_temperature != self.temperature:
            student_kd_logps = self._score_student(input_ids, attention_mask, mask, kd_temperature).logps
        rewards = token_rewards(teacher_kd_logps, student_kd_logps, mask)
        check_rewards(rewards, completion_ids, self._tokenizer)
        advantages = torch.zeros_like(rewards)
        if self.args.rkl_advantage:
            advantages = reward_to_go(
                rewards,
                mask,
                gamma=self.args.gamma,
                include_current=not self.args.single_step_decomposition,
                length_normalization=self.args.length_normalization,
            )
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": advantages,
            "old_per_token_logps": mixture_logps(student_logps, teacher_logps, alpha),
            "student_logps": student_logps,
            "teacher_hidden_states": teacher_hidden_states,
        }

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        mode = "train" if self.model.training else "eval"
        output = super()._generate_and_score_completions(inputs)
        if "tool_mask" in output:
            raise ValueError(
                "Rollouts with an env_mask or tools are not supported: every completion token is distilled."
            )
        batch = self._score_rollouts(
            *(output[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
            alpha=self.args.teacher_mixed_alpha if mode == "train" else 0.0,
            student_logps=output.get("old_per_token_logps"),
        )
        if self.reward_funcs:
            batch["advantages"] = batch["advantages"] + output["advantages"][:, None]
        else:  # GRPO's metrics of rewards that are not there
            for name in ("reward", "reward_std", "frac_reward_zero_std"):
                self._metrics[mode].pop(name, None)
        if "importance_sampling_ratio" in output:
            batch["importance_sampling_ratio"] = output["importance_sampling_ratio"]
        self._log_rollouts(inputs, batch)
        return batch

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.reward_funcs:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rows = len(prompts) * self.accelerator.num_processes
        return torch.zeros(rows, 1, device=self.accelerator.device)

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        if self._buffered_inputs is None:  # a resumed run starts at a fresh rollout, in step with the optimizer
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            noise = keyed_uniforms(len(generation_batch), self.args.seed, _ORDER, self.state.global_step)
            order = torch.from_numpy(noise.argsort())
            shuffled = {key: values[order.to(values.device)] for key, values in batch.items()}
            self._buffered_inputs = self._count_window_tokens(
                split_tensor_dict(shuffled, self.args.steps_per_generation)
            )
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _count_window_tokens(self, batches: list[Batch]) -> list[Batch]:
        window = self.args.gradient_accumulation_steps
        counts = self.accelerator.reduce(window_token_counts(batches, window), reduction="sum")
        return [{**batch, "window_tokens": counts[i // window]} for i, batch in enumerate(batches)]

    # Loss

    def _compute_loss(self, model, inputs: Batch) -> torch.Tensor:
        mask = inputs["completion_mask"].bool()
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).long()
        request = ScoreRequest(mask, self.temperature, inputs["teacher_hidden_states"], self.args.kd_temperature)
        scores = self._score(model, input_ids, attention_mask, request)
        long_term = clipped_policy_gradient_loss(
            scores.logps, inputs["old_per_token_logps"], inputs["advantages"], mask, self.args.epsilon
        )
        if "importance_sampling_ratio" in inputs:  # from vLLM's distribution to the student's
            long_term = long_term * inputs["importance_sampling_ratio"]
        per_token_loss = long_term
        if self.args.single_step_decomposition:
            per_token_loss = per_token_loss + scores.reverse_kl
        self._log_loss(inputs, scores, long_term, mask)
        return reduce_loss(per_token_loss, mask, self._loss_normalizer(inputs, mask))

    def _loss_normalizer(self, inputs: Batch, mask: torch.Tensor) -> torch.Tensor | float:
        in_window = "window_tokens" in inputs  # otherwise the batch counts as one optimizer step
        if self.args.loss_reduction == "sequence_sum":
            return len(mask) * (self.args.gradient_accumulation_steps if in_window else 1)
        tokens = inputs["window_tokens"] if in_window else self.accelerator.reduce(mask.sum(), reduction="sum")
        return tokens / self.accelerator.num_processes

    # Metrics

    def _log_loss(self, inputs: Batch, scores: TokenScores, long_term: torch.Tensor, mask: torch.Tensor) -> None:
        totals = loss_totals(inputs, scores, long_term.detach(), mask, self.args.epsilon)
        self._log(loss_metrics(self.accelerator.gather(totals[None])))

    def _log_rollouts(self, inputs: list[dict[str, Any]], batch: Batch) -> None:
        mask = batch["completion_mask"].bool()
        ids = [row[real].tolist() for row, real in zip(batch["completion_ids"].cpu(), mask.cpu(), strict=True)]
        values = {
            "rollout/eos_rate": [float(bool(row) and row[-1] in self.eos_token_ids) for row in ids],
            "rollout/repeated_4grams": [repeated_ngrams(row, 4) for row in ids],
        }
        references = [] if self.model.training else [_references(row) for row in inputs]
        if references and all(references):
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            values["rouge_l"] = [rouge_l(text, each) for text, each in zip(texts, references, strict=True)]
        local = torch.tensor(list(values.values()), device=self.accelerator.device).mean(dim=1)
        means = self.accelerator.gather(local[None]).mean(dim=0).tolist()
        self._log(dict(zip(values, means, strict=True)))

    def _log(self, metrics: dict[str, float]) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)


def _teacher_is_the_reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
    raise RuntimeError("This placeholder for GRPOTrainer's constructor is never called.")


def _references(row: dict[str, Any]) -> list[str]:
    """Reference texts of a dataset row: its `references`, or its `completion`; empty if it has neither."""
    if row.get("references"):
        return list(row["references"])
    completion = row.get("completion")
    if isinstance(completion, list):
        completion = completion[-1]["content"]
    return [completion] if completion else []
