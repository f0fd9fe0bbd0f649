"""What a server says about its model and its tokenizer, the comparison with the student's, and what to request."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.encoding import encode_texts
from ..models.teacher import PROBE_TEXT


class TeacherServerError(UserError):
    """The teacher's servers give no scores. The message has the cause and the fix."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Digests of a tokenizer, equal for tokenizers that give every text the same ids.

    Args:
        size (`int`): number of tokens.
        vocabulary (`str`): digest of the tokens and their ids.
        probe (`list[int]`): ids of a text that differs between merges, normalisations and pre-tokenizations.
        chat_template (`str`, *optional*): digest of the chat template.
    """

    size: int
    vocabulary: str
    probe: list[int]
    chat_template: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenizerIdentity":
        """Compute the digests."""
        vocabulary = sorted(tokenizer.get_vocab().items())
        template = tokenizer.chat_template
        return cls(
            len(vocabulary),
            _digest(vocabulary),
            encode_texts(tokenizer, [PROBE_TEXT])[0],
            None if template is None else _digest(template),
        )


@dataclass(frozen=True)
class ServerIdentity:
    """What a server says about itself.

    Args:
        model (`str`): name of the model.
        fingerprint (`str`, *optional*): digest of its weights; None if the server has none, as with vLLM.
        vocab_size (`int`, *optional*): rows of its LM head; None if unknown.
        max_context (`int`, *optional*): longest sequence; None without a limit.
        tokenizer ([`TokenizerIdentity`], *optional*): None if the server does not describe it.
        eos_token_ids (`list[int]`): ids that end a completion, by its generation config and its tokenizer.
        protocol (`int`): version of our server's messages; the first one was not named.
    """

    model: str
    fingerprint: str | None = None
    vocab_size: int | None = None
    max_context: int | None = None
    tokenizer: TokenizerIdentity | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    protocol: int = 1

    @property
    def name(self) -> str:
        """The model as messages show it."""
        return repr(self.model) if self.fingerprint is None else f"{self.model!r} ({self.fingerprint[:8]})"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ServerIdentity":
        """Undo [`to_json`]; unknown names are ignored.

        Raises:
            TypeError: if `model` is missing.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        if known.get("tokenizer") is not None:
            known["tokenizer"] = TokenizerIdentity(**known["tokenizer"])
        return cls(**known)


@dataclass(frozen=True)
class Scoring:
    """What to compute for each token.

    Args:
        top_k (`int`): number of listed tokens.
        temperature (`float`): temperature of the log-probs.
        vocab_size (`int`): leading vocabulary rows that student and teacher share.
        identity ([`ServerIdentity`]): the teacher that must answer.
        tokens (`str`): whose most likely tokens are listed, the `"student"`'s, which the rows name, or the
            `"teacher"`'s.
    """

    top_k: int
    temperature: float
    vocab_size: int
    identity: ServerIdentity
    tokens: str = "teacher"


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, server: TokenizerIdentity, url: str, conversational: bool
) -> None:
    """Check that the student's tokenizer and a server's give every text the same ids.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        server ([`TokenizerIdentity`]): the server's.
        url (`str`): the server's address.
        conversational (`bool`): whether prompts are conversations, so that the chat templates must be equal too.

    Raises:
        UserError: with the first difference.
    """
    own = TokenizerIdentity.of(tokenizer)
    advice = "Serve a teacher with the student's tokenizer: MiniLLM compares next-token distributions."
    if own.vocabulary != server.vocabulary:
        raise UserError(
            f"The teacher on {url} has another tokenizer than the student: {server.size} tokens, the student has "
            f"{own.size}, and the vocabularies differ. {advice}"
        )
    if own.probe != server.probe:
        raise UserError(
            f"The tokenizers of the student and of the teacher on {url} share a vocabulary but encode the same text "
            f"differently: {own.probe[:8]} and {server.probe[:8]}. {advice}"
        )
    if conversational and own.chat_template != server.chat_template:
        raise UserError(
            f"The student and the teacher on {url} have different chat templates, so a conversation would reach the "
            "teacher in a format that the teacher was not trained on. Save the teacher's template with the student."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
