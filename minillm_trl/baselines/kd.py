"""Train the paper's KD baseline, word-level knowledge distillation, with TRL's `SFTTrainer`."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UserError
from ..hardware.precision import half_precision
from ..models.end_tokens import declared_ends, token_name
from ..models.fused_head import add_scoring
from ..models.init_kwargs import parsed_kwargs
from ..models.lm_head import LMHead, check_head
from ..models.teacher import place_new_teacher, shared_vocab_size
from ..training.checks import check_apart, check_student
from ..training.language_modeling import language_modeling_request
from ..training.logged_metrics import token_totals
from ..training.run_settings import describe_model
from .configs import KDConfig
from .fine_tuning import FineTuningTrainer

logger = logging.get_logger(__name__)


class KDTrainer(FineTuningTrainer):
    r"""Fine-tune a student on data and on the teacher's next-token distributions at each of its tokens.

    The loss of a completion token $y_t$ of the data is

    $$ \ell_t = -(1-\lambda) \log q_\theta(y_t|y_{<t}, x) + \lambda\, \mathrm{KL}\big(p(\cdot|y_{<t}, x) \,\|\,
    q_\theta(\cdot|y_{<t}, x)\big) $$

    with $\lambda$ = `kd_ratio`, in nats, averaged over the completion tokens of the optimizer step on all processes.
    The teacher's distribution $p$ is detached. Logits of both models are computed for one chunk of tokens at a time.
    `eval_loss` is the cross-entropy alone, comparable with `eval_loss` of fine-tuning. `kd/forward_kl` and
    `kd/cross_entropy` are logged in training, and with the prefix `eval_` in evaluation.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            The teacher. It shares the student's tokenizer; it is frozen and put in eval mode.
        args ([`KDConfig`]):
            Configuration.
        kwargs:
            As in [`FineTuningTrainer`].

    Raises:
        ValueError: for settings that have no effect in KD, and for unsupported heads or vocabularies.
    """

    args: KDConfig

    def __init__(self, *, teacher_model: str | PreTrainedModel, args: KDConfig, **kwargs: Any):
        check_apart(kwargs["model"], teacher_model)
        super().__init__(args=args, **kwargs)
        check_student(self)
        self.settings.inputs["teacher_model"] = describe_model(teacher_model)
        self.teacher_model = place_new_teacher(
            teacher_model,
            self.accelerator,
            init_kwargs=parsed_kwargs(args.teacher_model_init_kwargs),
            default_dtype=half_precision(self.accelerator) or torch.float32,
            shard=args.shard_teacher,
            trust_remote_code=args.trust_remote_code,
            allow_pickled_weights=args.allow_pickled_weights,
        )
        if self.accelerator.is_main_process:
            self._compare_ends()
        check_head(self.teacher_model, "teacher")
        with self._whole_student() as student:
            vocab_size = shared_vocab_size(student, self.teacher_model, self._tokenizer)
            check_head(student, "student")
        add_scoring(self._student, vocab_size, LMHead.of(self.teacher_model).frozen(self.accelerator.device))

    def _compare_ends(self) -> None:
        """Warn if the data ends completions with a token that does not end them for the teacher."""
        tokenizer = self._tokenizer
        ends = [
            id_ for id_ in declared_ends(self.teacher_model.generation_config, "the teacher") if id_ < len(tokenizer)
        ]
        if self._learnt_end is None or not ends or self._learnt_end in ends:
            return
        logger.warning(
            f"The data ends completions with {token_name(tokenizer, self._learnt_end)}, the teacher with "
            f"{' or '.join(token_name(tokenizer, id_) for id_ in ends)} (its generation config). If the teacher has "
            "not learnt the data's end token, it will expect every answer to continue. Fine-tune the teacher on the "
            "data, or, for texts, set eos_token to the teacher's end token."
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed loss of a micro-batch divided by the number of tokens of the whole optimizer step.

        Raises:
            ValueError: if `return_outputs` is set, since there are no logits to return.
        """
        # TRL: computes the cross-entropy alone
        if return_outputs:
            raise UserError("KDTrainer never holds all logits, so it does not support compute_metrics. Drop it.")
        mask = inputs["labels"][:, 1:] != -100
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "loss_mask": mask}
        with self.accelerator.autocast():
            request = language_modeling_request(batch, self.teacher_model, self.args.kd_ratio)
            (scores,) = model(score_requests=[request])
        per_token = {"kd/cross_entropy": -scores.logps, "kd/forward_kl": scores.divergence, "entropy": scores.entropy}
        self.means.add(self.mode, token_totals(per_token, mask))
        if not self.model.training:
            self.means.add_eval_loss(-scores.logps.sum(), mask.sum())
            return -scores.logps.sum() / mask.sum().clamp(min=1)
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = scores.loss / torch.as_tensor(tokens, device=mask.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        return self._check_loss(loss, inputs)
