"""Teacher-mixed sampling in `generate` of transformers."""

import inspect

import numpy as np
import torch
from transformers import LogitNormalization, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process

from ..errors import UserError
from .decoding import LazyDecoder
from .keyed_random import keyed_uniforms
from .slots import Slots

# Processors that scale or shift all scores of a row by the same amount: samples still follow the mixture
_HARMLESS = (LogitNormalization, logits_process.TemperatureLogitsWarper)


class TeacherMixedLogitsProcessor(LogitsProcessor):
    r"""Teacher-mixed sampling for `student.generate`.

    ```python
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    mixture = TeacherMixedLogitsProcessor(teacher, 0.2, inputs["attention_mask"])
    student.generate(**inputs, do_sample=True, top_k=0, logits_processor=[mixture])
    ```

    At each step a coin decides whether the scores are the student's or the teacher's; `generate` then draws from them.
    So each sequence follows $\alpha p + (1-\alpha) q$ (Eq. 4) at any `temperature`, which `generate` applies after its
    custom processors. All rows of the batch share the coin, and the teacher runs only at the steps that it won. Make a
    new processor for each call of `generate`.

    Nothing else may reshape the scores. `generate` keeps the 50 most likely tokens unless you pass `top_k=0`, and the
    generation configs of many models set `top_p` or a penalty. Such a call fails at its first step.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): the teacher, in eval mode, with the student's tokenizer.
        alpha (`float`): the teacher's share, in [0, 1].
        attention_mask (`torch.Tensor` of shape `(B, P)`): mask of the left-padded prompts passed to `generate`.
        seed (`int`, *optional*): seed of the coins; calls with the same seed toss the same coins. None draws them from
            torch's generator, as `generate` draws its tokens.

    Raises:
        ValueError: if `alpha` is outside [0, 1], the rows do not match `attention_mask`, the processor is used for a
            second call of `generate`, or that call reshapes the scores.
    """

    def __init__(self, teacher: PreTrainedModel, alpha: float, attention_mask: torch.Tensor, seed: int | None = None):
        if not 0.0 <= alpha <= 1.0:
            raise UserError(f"alpha must lie in [0, 1], got {alpha}.")
        self.alpha = alpha
        self.attention_mask = attention_mask
        self.seed = seed
        rows = teacher.get_output_embeddings().weight.shape[0]
        self._slots = Slots(len(attention_mask), teacher.get_output_embeddings().weight.device)
        self._decoder = LazyDecoder(teacher, rows, self._slots)
        self._length = attention_mask.shape[1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the model that won the coin, -inf for tokens that only one of the models has."""
        if input_ids.shape[0] != self.attention_mask.shape[0] or input_ids.shape[1] != self._length:
            raise UserError(
                f"Expected input_ids of shape {(self.attention_mask.shape[0], self._length)}, got "
                f"{tuple(input_ids.shape)}. Make one TeacherMixedLogitsProcessor for each call of generate, with the "
                "attention_mask of that call and without beams or num_return_sequences."
            )
        step = self._length - self.attention_mask.shape[1]
        if step == 0:
            _check_others()
            prompts = [row[keep].tolist() for row, keep in zip(input_ids, self.attention_mask.bool(), strict=True)]
            self._slots.admit(range(len(prompts)), prompts)
        else:
            self._slots.append(input_ids[:, -1], np.zeros(len(input_ids), dtype=bool))
        self._length += 1
        shared = min(self._decoder.vocab_size, scores.shape[1])
        coin = torch.rand((), dtype=torch.float64).item() if self.seed is None else keyed_uniforms(1, self.seed, step)
        if coin >= self.alpha:
            mixed = scores.clone()
            mixed[:, shared:] = -torch.inf  # tokens that the teacher lacks are never sampled
            return mixed
        mixed = torch.full_like(scores, -torch.inf)
        with torch.no_grad():
            logits = self._decoder.next_logits(np.arange(len(input_ids)))
        mixed[:, :shared] = logits[:, :shared].to(scores)
        return mixed


def _check_others() -> None:
    """Check that no other processor of transformers in the same list reshapes the scores.

    `generate` does not pass the list to its processors, so look for it among the callers. A custom decode loop may
    have no list.

    Raises:
        ValueError: naming the processors.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), LogitsProcessorList):
        frame = frame.f_back
    processors = [] if frame is None else frame.f_locals["self"]
    own = [processor for processor in processors if type(processor).__module__ == logits_process.__name__]
    reshaping = [type(processor).__name__ for processor in own if not isinstance(processor, _HARMLESS)]
    if reshaping:
        raise UserError(
            f"generate reshapes the scores with {', '.join(reshaping)}, so its samples would not follow the mixture "
            "of teacher and student. Switch this off in the call or in the student's generation_config: top_k=0 (the "
            "default is 50), top_p=1.0, repetition_penalty=1.0, min_new_tokens=None."
        )
