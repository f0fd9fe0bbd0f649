"""Fine-tune with TRL's `SFTTrainer`, evaluating on the student's own samples during training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTTrainer
from trl.models.utils import unwrap_model_for_generation

from ..data import unique_prompts
from ..errors import UserError
from ..hardware.precision import configure_wrappers, half_precision, keep_adapters_in_float32
from ..models.attention import avoid_cudnn_attention
from ..models.bitsandbytes_layout import keep_4bit_layout
from ..models.context import max_context, name_context
from ..models.encoding import encode_prompts, holds_conversations
from ..models.end_tokens import EndTokens, carry, read_generation_config
from ..models.forward_methods import rebind_fused_head
from ..models.init_kwargs import parsed_kwargs
from ..models.multimodal import refuse_multimodal
from ..models.pickled_weights import refuse_pickled_weights
from ..models.student_copy import RolloutCopy, shards_student, student_of
from ..rollouts.keyed_random import evaluation_key
from ..rollouts.sampling import sample_prompts
from ..training.ends_of_run import settle_tokenizer
from ..training.evaluation_rows import Row, fill_rows
from ..training.logged_metrics import degeneration_indicators, rouge_l_to_references, token_totals
from ..training.reliable_trainer import ReliableTrainer
from ..training.trained_weights import check_trained_weights
from .configs import FineTuningConfig
from .training_data import with_chat_template_kwargs, without_bos

_IGNORED = -100  # label of tokens that do not count in the loss


class FineTuningTrainer(ReliableTrainer, SFTTrainer):
    r"""[`~trl.SFTTrainer`] that can sample from the student at each evaluation.

    Each evaluation samples one completion per distinct prompt of the evaluation dataset, from the student alone, at
    temperature 1 and always with the same random numbers. Every process samples its share; means are over all prompts.

    Args:
        args ([`FineTuningConfig`]):
            Configuration.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Has the columns `prompt` and `completion` and, for several references per prompt, `references`.
        kwargs:
            As in [`~trl.SFTTrainer`].

    Raises:
        ValueError: if `predict_with_generate` is set and the dataset has no prompts, or leaves no room for samples.
    """

    # TRL types these as optional, and more widely than this trainer accepts
    args: FineTuningConfig
    model: PreTrainedModel
    _tokenizer: PreTrainedTokenizerBase

    def __init__(self, *, args: FineTuningConfig, eval_dataset: Dataset | None = None, **kwargs: Any):
        prompts = _prompts_with_references(eval_dataset) if args.predict_with_generate else None
        init_kwargs = parsed_kwargs(args.model_init_kwargs)
        if isinstance(kwargs["model"], str) and not args.allow_pickled_weights:
            refuse_pickled_weights(kwargs["model"], init_kwargs)
        self._ends: EndTokens | None = None
        self._generation_config = read_generation_config(
            kwargs["model"], (init_kwargs or {}).get("revision"), args.trust_remote_code
        )
        tokenizer = kwargs.get("processing_class")
        chosen_by_trl = args.eos_token is not None or args.chat_template_path is not None
        if tokenizer is not None and tokenizer.eos_token is None and not chosen_by_trl:
            # TRL pads with the EOS, so settle it before TRL looks for a padding token
            self._tokenizer = tokenizer
            self._settle_ends(args, holds_conversations(kwargs["train_dataset"]))
        super().__init__(args=args, eval_dataset=eval_dataset, **kwargs)
        self._set_up_student()
        self._eval_prompts = prompts
        self._whole_copy: RolloutCopy | None = None
        if prompts is not None:
            self._check_room(prompts)
            if shards_student(self.accelerator):  # copy the model before FSDP shards it
                self._whole_copy = self._copy_student()
                self._whole_copy.release()

    def _set_up_student(self) -> None:
        """Give the loaded student its end tokens, and check that its weights can be trained as configured."""
        if not isinstance(self.processing_class, ProcessorMixin):
            refuse_multimodal(self.model.config, f"model={self.model.config._name_or_path!r}")
        # data of token ids skips `_prepare_dataset`, which settles the ends of texts and conversations
        ends = self._settle_ends(self.args, conversational=False) if self._ends is None else self._ends
        carry(ends, self.model)
        if self.accelerator.is_main_process:
            ends.announce(self._tokenizer)
        avoid_cudnn_attention()
        configure_wrappers(self.accelerator)
        keep_4bit_layout(self.model)
        keep_adapters_in_float32(self.model)
        check_trained_weights(self)
        rebind_fused_head(self._student)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # TRL: encodes the data, so BOS and EOS must be settled before
        if self._ends is None:
            self._settle_ends(args, holds_conversations(dataset))
        dataset = with_chat_template_kwargs(dataset, parsed_kwargs(args.chat_template_kwargs))
        dataset = without_bos(dataset, self._tokenizer, args.dataset_text_field)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _settle_ends(self, args: FineTuningConfig, conversational: bool) -> EndTokens:
        """Find the tokens that end a completion of the training data, and set the tokenizer's EOS."""
        ends = self._ends = settle_tokenizer(
            self._tokenizer,
            keep_eos=args.eos_token is not None,
            conversational=conversational,
            student=self._generation_config,
            eos_tokens=args.eos_tokens,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        if conversational and ends.turn_end is None:
            ends.doubts.append(
                "The chat template writes no special token after an assistant's turn, so the student does not learn "
                f"to end. Make the template write {self._tokenizer.eos_token!r} there (tokenizer.chat_template, or "
                "chat_template_path)."
            )
        self._learnt_end = ends.turn_end if conversational else ends.eos
        return ends

    @property
    def _student(self) -> PreTrainedModel:
        return student_of(self.model, self.accelerator)

    def _check_room(self, prompts: Dataset) -> None:
        context = max_context(self._student)
        encoded = encode_prompts(self._tokenizer, prompts["prompt"], parsed_kwargs(self.args.chat_template_kwargs))
        longest = max(map(len, encoded))
        if context is not None and longest + self.args.max_completion_length > context:
            raise UserError(
                f"The longest prompt of eval_dataset has {longest} tokens; with max_completion_length="
                f"{self.args.max_completion_length} that is more than the student's {name_context(self._student)} of "
                f"{context}. Lower "
                "max_completion_length, or filter the prompts."
            )

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        # transformers: repeats the first rows in the last batch of an evaluation on several processes
        if not is_training:
            dataset = fill_rows(dataset, batch_size, self.accelerator, self.args, _blank)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as [`~trl.SFTTrainer`] does, but log means over all tokens."""
        # TRL: computes the loss within the forward pass, and logs the mean of the micro-batches' means
        found: list[Any] = []
        hook = model.register_forward_hook(lambda module, args, outputs: found.append(outputs))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()
        scores = next(output for output in reversed(found) if hasattr(output, "label_mask"))
        mask = scores.label_mask.bool()
        per_token = {"entropy": scores.entropy, "mean_token_accuracy": scores.is_top1}
        self.means.add(self.mode, token_totals(per_token, mask))
        for name in per_token:
            self._metrics[self.mode].pop(name)
        loss = result[0] if return_outputs else result
        if self.mode == "eval":
            self.means.add_eval_loss(loss * mask.sum(), mask.sum())
            return result
        loss = self._check_loss(loss, inputs)
        return (loss, *result[1:]) if return_outputs else loss

    def _check_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Note the loss of a training micro-batch if it is not finite, see [`StepGuard.check_loss`]."""

        def explain(value: float) -> str:
            text = self._tokenizer.decode(inputs["input_ids"][0][:32])
            return f"the loss is {value} in a micro-batch whose first row begins with {text!r}"

        return self.guard.check_loss(loss, explain, self._deepspeed_engine)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Evaluate as [`~trl.SFTTrainer`] does, and with `predict_with_generate` also on samples.

        Samples answer the prompts of the trainer's own `eval_dataset`, so another one here has none.
        """
        # TRL: passes each of several datasets to transformers' evaluation
        if self._eval_prompts is not None and eval_dataset is None and metric_key_prefix == "eval":
            for name, value in self._sample_metrics().items():
                self._metrics["eval"][name].append(value)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _copy_student(self) -> RolloutCopy:
        return RolloutCopy(self._student, half_precision(self.accelerator), sharded=True)

    @contextmanager
    def _whole_student(self) -> Iterator[PreTrainedModel]:
        """Yield the student, or a whole copy of it if ZeRO-3 or FSDP shards its weights.

        The copy is in half precision if the student trains in mixed precision.
        """
        if not shards_student(self.accelerator):
            yield self._student
        elif self._whole_copy is None:
            yield self._copy_student().model
        else:
            self._whole_copy.refresh(self._student)
            yield self._whole_copy.model
            self._whole_copy.release()

    @contextmanager
    def _sampling_model(self) -> Iterator[PreTrainedModel]:
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=False,
                gradient_checkpointing_kwargs=parsed_kwargs(self.args.gradient_checkpointing_kwargs),
            ),
            self._whole_student() as student,
            self.accelerator.autocast(),
        ):
            yield student.eval()

    @torch.no_grad()
    def _sample_metrics(self) -> dict[str, float]:
        """Sample a completion of every prompt and return the metrics' means over all processes."""
        assert self._eval_prompts is not None
        assert self._ends is not None
        tokenizer, processes, ends = self._tokenizer, self.accelerator.num_processes, self._ends.ids
        rows = self._eval_prompts.select(range(self.accelerator.process_index, len(self._eval_prompts), processes))
        prompt_ids = encode_prompts(tokenizer, rows["prompt"], parsed_kwargs(self.args.chat_template_kwargs))
        with self._sampling_model() as student:
            completions = sample_prompts(
                student,
                prompt_ids,
                keys=[evaluation_key(self.args.seed, ids) for ids in prompt_ids],
                max_new_tokens=self.args.max_completion_length,
                eos_token_ids=ends,
                pad_token_id=tokenizer.pad_token_id,
                batch_size=self.args.per_device_eval_batch_size,
                vocab_size=min(len(tokenizer), student.get_output_embeddings().weight.shape[0]),
            )
        # not `batch_decode`, which returns a text for no completions: a process may have no prompts
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]
        values: dict[str, list[float]] = {
            "rouge_l": rouge_l_to_references(texts, rows),
            "completions/mean_length": list(map(len, completions)),
            **degeneration_indicators(completions, ends),
        }
        # processes may have different numbers of prompts, so reduce sums and counts rather than means
        totals = torch.tensor([*(sum(per_row) for per_row in values.values()), len(completions)])
        *sums, count = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum").tolist()
        return {name: total / count for name, total in zip(values, sums, strict=True)}


def _blank(row: Row) -> Row:
    """Return a filler: a row without labels."""
    return {**row, "labels": [_IGNORED] * len(row["input_ids"])}


def _prompts_with_references(eval_dataset: Any) -> Dataset:
    """Return the distinct prompts of an evaluation dataset, with the completions as references if it has none."""
    if not isinstance(eval_dataset, Dataset) or not {"prompt", "completion"} <= set(eval_dataset.column_names):
        raise UserError(
            "predict_with_generate=True needs an eval_dataset (one datasets.Dataset) with the columns 'prompt' and "
            "'completion'."
        )
    if "references" not in eval_dataset.column_names:
        references = [
            [completion if isinstance(completion, str) else completion[0]["content"]]
            for completion in eval_dataset["completion"]
        ]
        eval_dataset = eval_dataset.add_column("references", references)
    return unique_prompts(eval_dataset)
