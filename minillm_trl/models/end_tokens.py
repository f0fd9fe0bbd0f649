"""Find the tokens that end a completion, and store them in student and tokenizer.

A model's generation config, tokenizer and chat template may each name a different token. A model that was trained on
conversations ends with the token that the chat template writes after the assistant's turn, even if the tokenizer has a
different EOS.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import UserError

if TYPE_CHECKING:  # importing these takes seconds, and reading a configuration does not need them
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EOS_TOKENS_HELP = (
    "Tokens that end a completion, such as '<|im_end|>'; by default those of tokenizers, generation configs and, for "
    "conversations, the chat template."
)
_MARK = "minillm0answer"  # stands for the answer; no template changes this text


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a completion; from [`find_end_tokens`].

    Attributes:
        sources (`dict[int, list[str]]`): for each token id, in ascending order, who names it.
        eos (`int`, *optional*): the id that the tokenizer should have as its EOS; None if it is undecided.
        turn_end (`int`, *optional*): the token that the chat template writes after an assistant's turn; None without a
            template, or if the template writes no special token there.
        declared (`frozenset[int]`): ids in the student's own generation config.
        doubts (`list[str]`): warnings, each with its remedy.
    """

    sources: dict[int, list[str]]
    eos: int | None
    turn_end: int | None
    declared: frozenset[int] = frozenset()
    doubts: list[str] = field(default_factory=list)

    def announce(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Log every doubt, and the tokens if they differ from the student's generation config."""
        if set(self.ids) != self.declared:
            logger.warning(
                f"Completions end with {self.describe(tokenizer)}. The student is saved with them; eos_tokens chooses "
                "others."
            )
        for doubt in self.doubts:
            logger.warning(doubt)

    @property
    def ids(self) -> list[int]:
        """The ids that end a completion, in ascending order."""
        return list(self.sources)

    def describe(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return the tokens as a message shows them, each with its sources."""
        return ", ".join(f"{token_name(tokenizer, id_)} ({' and '.join(who)})" for id_, who in self.sources.items())


def find_end_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    conversational: bool,
    student: "GenerationConfig | None" = None,
    teacher: "GenerationConfig | None" = None,
    teacher_tokenizer: "PreTrainedTokenizerBase | None" = None,
    eos_tokens: Sequence[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    keep_eos: bool = False,
) -> EndTokens:
    """Find the tokens that end a completion.

    If `eos_tokens` is given, these tokens and no others. Otherwise the union of the tokenizer's EOS, the ids of the
    student's generation config, for conversations the token that the chat template writes after an assistant's turn,
    and the teacher's end tokens. The teacher's end tokens count only if they are special tokens: many configurations
    have a default id that is an ordinary token in another tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's tokenizer.
        conversational (`bool`): whether prompts are conversations.
        student, teacher ([`~transformers.GenerationConfig`], *optional*): generation configs of the two models.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the teacher's tokenizer, with the
            same vocabulary.
        eos_tokens (`Sequence[str]`, *optional*): tokens, such as `["<|im_end|>"]`.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.
        keep_eos (`bool`, *optional*, defaults to `False`): whether to keep the tokenizer's EOS.

    Raises:
        ValueError: if one of `eos_tokens` is not a token, or a generation config has an `eos_token_id` that is not an
            id.
    """
    turn_end = find_turn_end(tokenizer, chat_template_kwargs)
    end_of_conversation = turn_end if conversational else None
    declared = declared_ends(student, "the student")
    own = [*_listed(tokenizer.eos_token_id), *declared]
    if eos_tokens:
        sources, doubts = _given_tokens(tokenizer, eos_tokens, end_of_conversation)
    else:
        candidates = [
            ("the tokenizer", _listed(tokenizer.eos_token_id)),
            ("the student's generation config", declared),
            ("the chat template", _listed(end_of_conversation)),
            ("the teacher's generation config", declared_ends(teacher, "the teacher")),
            ("the teacher's tokenizer", _listed(teacher_tokenizer and teacher_tokenizer.eos_token_id)),
        ]
        sources, doubts = _accepted_tokens(tokenizer, candidates, own)
    eos = tokenizer.eos_token_id
    if not keep_eos:
        eos = _choose_eos(tokenizer, sources, own, end_of_conversation, bool(eos_tokens))
    return EndTokens(dict(sorted(sources.items())), eos, turn_end, frozenset(declared), doubts)


def _given_tokens(
    tokenizer: "PreTrainedTokenizerBase", eos_tokens: Sequence[str], turn_end: int | None
) -> tuple[dict[int, list[str]], list[str]]:
    """Return the sources of the tokens that the user named, and a doubt if the end of a turn is missing."""
    sources: dict[int, list[str]] = {_id_of(tokenizer, token): ["eos_tokens"] for token in eos_tokens}
    if turn_end is None or turn_end in sources:
        return sources, []
    return sources, [
        f"The chat template ends an assistant's turn with {token_name(tokenizer, turn_end)}, which is not in "
        f"eos_tokens={list(eos_tokens)}. Add it, unless the models end with something else."
    ]


def _accepted_tokens(
    tokenizer: "PreTrainedTokenizerBase", candidates: Sequence[tuple[str, list[int]]], own: Sequence[int]
) -> tuple[dict[int, list[str]], list[str]]:
    """Return the sources of special tokens and the student's own tokens, and a doubt for each ordinary token."""
    sources: dict[int, list[str]] = {}
    doubts: list[str] = []
    special = special_ids(tokenizer)
    for who, id_ in ((who, id_) for who, ids in candidates for id_ in ids):
        if id_ not in special and id_ < len(tokenizer):
            doubts.append(_doubt_ordinary(tokenizer, who, id_, counts=id_ in own))
        if id_ in special or id_ in own:
            sources.setdefault(id_, []).append(who)
    return sources, doubts


def check_eos_tokens(value: str | Sequence[str] | None) -> list[str] | None:
    """Return the field `eos_tokens` as a list; a single token need not be in a list.

    Raises:
        ValueError: if it is empty, or holds something other than non-empty texts.
    """
    if value is None:
        return None
    tokens = [value] if isinstance(value, str) else value
    is_list = isinstance(tokens, (list, tuple)) and len(tokens) > 0
    if not is_list or not all(isinstance(token, str) and token for token in tokens):
        raise UserError(f"eos_tokens must be a list of tokens such as ['<|im_end|>'], got {value!r}.")
    return list(tokens)


def find_turn_end(
    tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: dict[str, Any] | None = None
) -> int | None:
    """Return the first special token that the chat template writes after the assistant's last turn.

    None without a chat template, if there is no such token, or if the template rejects a plain conversation.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **(chat_template_kwargs or {}))
    except (TemplateError, TypeError, ValueError, KeyError):  # raised by templates that reject the conversation
        return None
    _, mark, tail = str(text).rpartition(_MARK)
    special = special_ids(tokenizer)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if mark else []
    return next((id_ for id_ in ids if id_ in special), None)


def declared_ends(config: "GenerationConfig | None", who: str = "the model") -> list[int]:
    """Return the `eos_token_id` of a generation config as a list; empty without a config.

    Args:
        config ([`~transformers.GenerationConfig`], *optional*): the generation config.
        who (`str`, *optional*, defaults to `"the model"`): the config's owner, for the message.

    Raises:
        ValueError: if one of them is not an integer of 32 bits.
    """
    ids = _listed(None if config is None else config.eos_token_id)
    for id_ in ids:
        if type(id_) is not int or abs(id_) >= 2**31:
            raise UserError(
                f"The generation config of {who} has the eos_token_id {id_!r}, which is not a token id. Fix its "
                "generation_config.json."
            )
    return ids


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of special tokens and of other added tokens, without added tokens of white space."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if str(token).strip())}


def token_name(tokenizer: "PreTrainedTokenizerBase", id_: int) -> str:
    """Return the token as messages show it: its text, or its id if the tokenizer has no such token."""
    token = tokenizer.convert_ids_to_tokens(id_) if id_ < len(tokenizer) else None
    return f"the id {id_}" if token is None else repr(token)


def read_generation_config(
    model: "str | PreTrainedModel", revision: str | None = None, trust_remote_code: bool = False
) -> "GenerationConfig | None":
    """Return the generation config of a model; a model given by name is not loaded.

    None if no config can be read: loading the model later reports why.
    """
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    from transformers import AutoConfig, GenerationConfig

    revision = revision or "main"
    try:
        if has_generation_config(model, revision):
            return GenerationConfig.from_pretrained(model, revision=revision)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError):
        return None
    return GenerationConfig.from_model_config(config)


def has_generation_config(model: str, revision: str = "main") -> bool:
    """Return whether a generation config was saved with the model or adapter `model`."""
    flags = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{flag}": False for flag in flags}
    from transformers.utils import cached_file  # takes a second to import, which parsing options should not

    return cached_file(model, "generation_config.json", revision=revision, **quiet) is not None


def adopt_generation_config(model: "PreTrainedModel", adapter: str) -> None:
    """Give the base of an adapter the generation config that was saved with the adapter, if there is one."""
    from transformers import GenerationConfig

    if has_generation_config(adapter):
        model.generation_config = GenerationConfig.from_pretrained(adapter)


def check_eos(tokenizer: "PreTrainedTokenizerBase", ends: EndTokens) -> None:
    """Check that the EOS of training data is decided.

    Raises:
        ValueError: if no token or several tokens could be the EOS.
    """
    if ends.eos is not None:
        return
    candidates = (
        f"several tokens may end a completion: {ends.describe(tokenizer)}" if ends.sources else "no config names one"
    )
    raise UserError(
        f"The tokenizer {tokenizer.name_or_path!r} has no eos_token, and {candidates}. Set the token that ends a "
        "completion, for example eos_tokens=['<|im_end|>']."
    )


def carry(ends: EndTokens, model: "PreTrainedModel") -> None:
    """Store the tokens in a model's configs, so that `generate` stops at them after the model is saved."""
    if set(ends.ids) != ends.declared:
        others = [id_ for id_ in ends.ids if id_ != ends.eos]
        model.generation_config.eos_token_id = [*_listed(ends.eos), *others] if others else ends.eos
    config: "PreTrainedConfig" = model.config.get_text_config()
    known = config.eos_token_id
    if ends.eos is not None and ends.eos not in _listed(known):
        config.eos_token_id = [ends.eos, *known] if isinstance(known, list) else ends.eos


def set_eos(tokenizer: "PreTrainedTokenizerBase", ends: EndTokens) -> None:
    """Set the tokenizer's EOS, and its padding token if it has none."""
    if ends.eos is not None and tokenizer.eos_token_id != ends.eos:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends.eos)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _choose_eos(
    tokenizer: "PreTrainedTokenizerBase",
    sources: dict[int, list[str]],
    own: list[int],
    turn_end: int | None,
    given: bool,
) -> int | None:
    """Choose the tokenizer's EOS: the current one unless the user named others or conversations end differently."""
    current = tokenizer.eos_token_id
    if given:
        return current if current in sources else next(iter(sources))
    if turn_end is not None and (current is None or turn_end not in own):
        return turn_end
    if current is not None:
        return current
    special = special_ids(tokenizer)
    candidates = [id_ for id_ in sources if id_ in special]
    return candidates[0] if len(candidates) == 1 else None


def _doubt_ordinary(tokenizer: "PreTrainedTokenizerBase", who: str, id_: int, counts: bool) -> str:
    effect = "completions end with it nevertheless" if counts else "it is ignored"
    return (
        f"{who[0].upper()}{who[1:]} ends completions with {token_name(tokenizer, id_)} (id {id_}), an ordinary token "
        f"of the tokenizer; {effect}. Fix its generation_config.json, or set eos_tokens to the tokens that end a "
        "completion."
    )


def _id_of(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    if token not in (vocabulary := tokenizer.get_vocab()):
        raise UserError(
            f"eos_tokens: {token!r} is not a token of {tokenizer.name_or_path!r}, whose special tokens are "
            f"{tokenizer.all_special_tokens}. Name one of its tokens."
        )
    return vocabulary[token]


def _listed(value: Any) -> list[Any]:
    """Return the values of a field that holds a list, a single value or None."""
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]
