"""The teacher of `MiniLLMTrainer` on servers: connecting to it, and its states of a rollout."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..models.context import max_context
from ..models.encoding import encode_texts
from ..models.teacher import PROBE_TEXT
from ..rollouts.buffer import Batch
from .identity import Scoring, ServerIdentity, TeacherServerError, check_tokenizer
from .protocol import Row
from .top_k import MAX_VOCAB_SIZE, TopKHead

if TYPE_CHECKING:
    from ..config import MiniLLMConfig
    from .server_pool import ServerPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher on servers, which all serve the same model.

    Args:
        pool ([`ServerPool`]): the servers.
        identity ([`ServerIdentity`]): what they serve.
        top_k (`int`): number of tokens that are listed for each token.
        temperature (`float`): temperature of rewards and single step.
        tokens (`str`): whose most likely tokens are listed, the `"student"`'s or the `"teacher"`'s.
    """

    pool: "ServerPool"
    identity: ServerIdentity
    top_k: int
    temperature: float
    tokens: str

    @classmethod
    def connect(cls, args: "MiniLLMConfig", urls: Sequence[str]) -> "ServedTeacher":
        """Connect to the servers at `urls`, with the settings of a configuration.

        Raises:
            TeacherServerError: if a server does not answer, or they serve different models.
            UserError: for a temperature that vLLM's log-probs do not have, and tokens that it cannot list.
        """
        from .server_pool import ServerPool  # needs aiohttp, an optional package

        pool = ServerPool(
            urls,
            args.teacher_server_batch_size,
            args.teacher_server_timeout,
            args.teacher_server_retries,
        )
        identity = pool.connect()
        if pool.has_vllm and args.temperature != 1.0:
            raise UserError(
                f"temperature={args.temperature}: the prompt_logprobs of vLLM are at temperature 1. Set "
                "temperature=1.0, or serve the teacher with minillm-trl serve-teacher."
            )
        if pool.has_vllm and args.teacher_server_tokens == "student":
            raise UserError(
                f"teacher_server_tokens='student': {pool.urls[0]} is vLLM, whose prompt_logprobs list the teacher's "
                "most likely tokens only. Drop it, or serve the teacher with minillm-trl serve-teacher."
            )
        tokens = args.teacher_server_tokens or ("teacher" if pool.has_vllm else "student")
        return cls(pool, identity, args.teacher_server_top_k, args.temperature, tokens)

    def describe(self) -> dict[str, Any]:
        """Return name and digest, as [`~minillm_trl.training.run_settings.describe_model`] does for local models."""
        return {"is": self.identity.model, "digest": self.identity.fingerprint}

    @property
    def generation_config(self) -> GenerationConfig:
        """The tokens that end a completion, by the server."""
        return GenerationConfig(eos_token_id=self.identity.eos_token_ids or None)

    def check(self, tokenizer: PreTrainedTokenizerBase, conversational: bool) -> None:
        """Check that the tokenizers are the same, and that the servers can answer.

        Raises:
            UserError: with the first difference between the tokenizers, or for more tokens than vLLM can list.
            TeacherServerError: if the servers refuse a small request.
        """
        if self.pool.has_vllm and self.top_k > len(tokenizer):
            raise UserError(
                f"teacher_server_top_k={self.top_k}, but the vocabulary has {len(tokenizer)} tokens. A request for "
                f"more stops vLLM. Set teacher_server_top_k={len(tokenizer)} or less."
            )
        url = self.pool.urls[0]
        if self.identity.tokenizer is not None:
            check_tokenizer(tokenizer, self.identity.tokenizer, url, conversational)
        own = encode_texts(tokenizer, [PROBE_TEXT])[0]
        for url, theirs in self.pool.encodings(self.identity.model, PROBE_TEXT):
            if theirs is None:
                logger.warning(
                    f"{url} does not offer its tokenizer, so it was not compared with the student's. Make sure that "
                    "they are the same."
                )
            elif theirs != own:
                raise UserError(
                    f"The teacher on {url} has another tokenizer than the student: they encode the same text as "
                    f"{theirs[:8]} and {own[:8]}. Serve a teacher with the student's tokenizer: MiniLLM compares "
                    "next-token distributions."
                )
        scoring, completion = self.scoring(len(tokenizer)), own[1 : min(self.identity.max_context or len(own), 8)]
        listed = torch.zeros(len(completion), scoring.top_k, dtype=torch.int32) if self.tokens == "student" else None
        self.pool.score([Row(own[:1], completion, listed)], scoring)

    def scoring(self, vocab_size: int) -> Scoring:
        """Return what to request for each token."""
        return Scoring(min(self.top_k, vocab_size), self.temperature, vocab_size, self.identity, self.tokens)

    def shared_vocab_size(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of leading vocabulary rows that both models have; the student's, if vLLM does not say.

        Raises:
            UserError: if the tokenizer has more tokens than a head has rows, or the vocabulary is too large.
        """
        head: Any = student.get_output_embeddings()
        rows = {"student": head.weight.shape[0], "teacher": self.identity.vocab_size or head.weight.shape[0]}
        for name, size in rows.items():
            if size < len(tokenizer):
                raise UserError(f"The tokenizer has {len(tokenizer)} tokens but the {name}'s LM head has {size} rows.")
        if (size := min(rows.values())) > MAX_VOCAB_SIZE:
            raise UserError(f"A teacher on a server is limited to {MAX_VOCAB_SIZE} tokens, the models have {size}.")
        return size

    def max_context(self, student: PreTrainedModel) -> int | None:
        """Return the longest sequence that both models can take; None if neither has a limit."""
        limits = [limit for limit in (max_context(student), self.identity.max_context) if limit is not None]
        return min(limits, default=None)


@dataclass
class RemoteTeacher:
    """What [`~minillm_trl.rollouts.rollout_teacher.RolloutTeacher`] is for a local teacher.

    A state is the packed [`~minillm_trl.teacher_server.top_k.TopK`] of a token instead of a hidden state, and `head`
    completes the distribution from it.

    Args:
        served ([`ServedTeacher`]): the teacher.
        scoring ([`Scoring`]): what to request.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        kept_on (`str`): where the buffer keeps states: on the `"device"` or the `"cpu"`.
    """

    served: ServedTeacher
    scoring: Scoring
    accelerator: Accelerator
    kept_on: str
    model: None = None
    is_sharded: bool = False
    is_served: bool = True

    def __post_init__(self) -> None:
        self.head = TopKHead(self.scoring.temperature)
        self._failure: TeacherServerError | None = None

    def head_on(self, device: torch.device) -> TopKHead:
        """Return the head, which has no weights and so no device."""
        return self.head

    @property
    def models(self) -> list[PreTrainedModel]:
        """No model in this process."""
        return []

    @property
    def state_width(self) -> int:
        """Numbers of a packed [`~minillm_trl.teacher_server.top_k.TopK`]: of the listed tokens and the sampled one."""
        return 2 * (self.scoring.top_k + 1) + 1

    @property
    def state_dtype(self) -> torch.dtype:
        """float32, which holds token ids exactly."""
        return torch.float32

    @property
    def student_top_k(self) -> int:
        """Number of the student's most likely tokens that a request lists."""
        return self.scoring.top_k if self.scoring.tokens == "student" else 0

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        length: int,
        student_top_ids: torch.Tensor | None = None,
        teacher_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Request the states `(B, T, 2K + 1)` of the last `length` tokens of sequences `(B, P+T)`.

        If the servers give no scores, the states are zeros until [`raise_failures`] is called.
        """
        listed: Sequence[torch.Tensor | None] = [None] * len(input_ids)
        if self.scoring.tokens == "student":
            assert student_top_ids is not None, "the scorer was not asked for the student's tokens"
            listed = list(student_top_ids.cpu())
        rows, lengths = [], attention_mask[:, -length:].sum(dim=1).tolist()
        for ids, real, count, names in zip(input_ids.cpu(), attention_mask.bool().cpu(), lengths, listed, strict=True):
            tokens = ids[real].tolist()
            own = None if names is None else names[:count]
            rows.append(Row(tokens[: len(tokens) - count], tokens[len(tokens) - count :], own))
        states = torch.zeros(len(rows), length, self.state_width)
        if self._failure is None:
            try:
                for state, answer in zip(states, self.served.pool.score(rows, self.scoring), strict=True):
                    state[: len(answer)] = answer
            except TeacherServerError as error:
                self._failure = error
        return states.to(self.accelerator.device)

    def raise_failures(self) -> None:
        """Stop all processes if the servers of one have failed since the last call.

        All processes call this once a rollout; they may send different numbers of requests before.

        Raises:
            TeacherServerError: if the servers gave no scores.
        """
        failure, self._failure = self._failure, None
        failed = torch.tensor(int(failure is not None), device=self.accelerator.device)
        if int(self.accelerator.reduce(failed, reduction="sum")):
            raise failure or TeacherServerError("The teacher's servers of another process failed, see its message.")

    def hidden_states_of(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch's completions from the buffer."""
        return batch["teacher_hidden_states"].to(self.accelerator.device, non_blocking=True)

    def keep(self, states: torch.Tensor | None) -> torch.Tensor | None:
        """Return the states as the buffer keeps them."""
        return states if states is None or self.kept_on == "device" else states.cpu()
