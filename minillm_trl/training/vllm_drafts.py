"""vLLM, in the process of the trainer, as the engine that drafts for speculative mixing."""

from typing import TYPE_CHECKING, Any

from trl.extras.profiling import profiling_context

from ..errors import UserError
from ..rollouts.engine_drafts import Draft, EngineDrafts

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

    from .teacher_mixed_trainer import TeacherMixedTrainer


class VLLMEngine:
    """Draw segments with vLLM, see [`~minillm_trl.rollouts.engine_drafts.Engine`].

    Args:
        generation (`VLLMGeneration`): TRL's vLLM, in this process.
    """

    def __init__(self, generation: "VLLMGeneration"):
        self._generation = generation

    def __call__(self, texts: list[list[int]], limits: list[int], seeds: list[int]) -> list[Draft]:
        """Continue texts by segments of at most `limits` tokens.

        Raises:
            UserError: if vLLM has no room for a segment.
        """
        from vllm import SamplingParams

        generation = self._generation
        options = {"temperature": generation.temperature, "logprobs": 0, "detokenize": False}
        options |= generation.generation_kwargs  # the tokens that end a completion
        parameters = [
            SamplingParams(max_tokens=limit, seed=seed, **options) for limit, seed in zip(limits, seeds, strict=True)
        ]
        outputs = generation.llm.generate([{"prompt_token_ids": text} for text in texts], parameters, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        for text, limit, answer in zip(texts, limits, answers, strict=True):
            if len(answer.token_ids) < limit and answer.finish_reason != "stop":
                raise UserError(
                    f"vLLM continued a text of {len(text)} tokens by {len(answer.token_ids)} of {limit} tokens. Raise "
                    "vllm_max_model_length to the longest prompt and max_completion_length together."
                )
        return [self._draft(answer) for answer in answers]

    @staticmethod
    def _draft(answer: Any) -> Draft:
        tokens = list(answer.token_ids)
        listed = zip(tokens, answer.logprobs, strict=True)
        return Draft(tokens, [of_place[token].logprob for token, of_place in listed])


def vllm_drafts(trainer: "TeacherMixedTrainer") -> EngineDrafts | None:
    """Return the drafts of the trainer's vLLM, if its training rollouts are mixed."""
    mixes = trainer.args.teacher_mixed_alpha > 0.0 and trainer.rollout_func is None
    return EngineDrafts(VLLMEngine(trainer.vllm_generation)) if trainer.use_vllm and mixes else None


def update_vllm(trainer: "TeacherMixedTrainer") -> None:
    """Copy the student's weights to vLLM if they have changed, as TRL does before it samples with vLLM."""
    if trainer.state.global_step != trainer._last_loaded_step:
        with profiling_context(trainer, "sync_weights"):
            trainer.vllm_generation.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
