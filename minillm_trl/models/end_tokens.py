"""What ends a completion: who names a token for it, which of them count, and what student and tokenizer then carry.

A model's generation config, its tokenizer and its chat template may each name another token. A model that was trained
on conversations ends with what the chat template writes after the assistant's turn, whatever its tokenizer's EOS is.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import UserError

if TYPE_CHECKING:  # these take seconds to import, which a configuration need not wait for
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EOS_TOKENS_HELP = (
    "Tokens that end a completion, such as '<|im_end|>'; by default those of tokenizers, generation configs and, for "
    "conversations, the chat template."
)
_MARK = "minillm0answer"  # a text that templates leave as it is


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a completion; from [`find_end_tokens`].

    Attributes:
        sources (`dict[int, list[str]]`): who names each of them, by id in ascending order.
        eos (`int`, *optional*): the one that the tokenizer is to have as its EOS; None if nothing says which.
        turn_end (`int`, *optional*): what the chat template writes after an assistant's turn; None without a template,
            or if it writes no special token there.
        declared (`frozenset[int]`): those that the student's own generation config has.
        doubts (`list[str]`): what may be wrong, each in one sentence with its remedy.
    """

    sources: dict[int, list[str]]
    eos: int | None
    turn_end: int | None
    declared: frozenset[int] = frozenset()
    doubts: list[str] = field(default_factory=list)

    def announce(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Log what ends completions where the student's generation config does not say so, and every doubt."""
        if set(self.ids) != self.declared:
            logger.warning(
                f"Completions end with {self.describe(tokenizer)}. The student is saved with them; eos_tokens chooses "
                "others."
            )
        for doubt in self.doubts:
            logger.warning(doubt)

    @property
    def ids(self) -> list[int]:
        """Every id that ends a completion, in ascending order."""
        return list(self.sources)

    def describe(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Name the tokens, each with those that name it."""
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

    Those of `eos_tokens`, if it is given. Otherwise all of these: the EOS of the tokenizer, those of the student's
    generation config, for conversations what the chat template writes after an assistant's turn, and what the teacher
    ends with. Of the teacher's only special tokens count: the default of many configurations is an id that is an
    ordinary token of another tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        conversational (`bool`): whether prompts are conversations.
        student, teacher ([`~transformers.GenerationConfig`], *optional*): their generation configs.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the teacher's, with the same
            vocabulary.
        eos_tokens (`Sequence[str]`, *optional*): tokens, such as `["<|im_end|>"]`.
        chat_template_kwargs (`dict`, *optional*): what else the chat template is given.
        keep_eos (`bool`, *optional*, defaults to `False`): whether the tokenizer's EOS stays what it is.

    Raises:
        ValueError: if one of `eos_tokens` is no token, or a generation config names something else than ids.
    """
    turn_end = find_turn_end(tokenizer, chat_template_kwargs)
    declared = declared_ends(student, "the student")
    sources: dict[int, list[str]] = {}
    doubts: list[str] = []
    own = [*_listed(tokenizer.eos_token_id), *declared]
    if eos_tokens:
        for token in eos_tokens:
            sources.setdefault(_id_of(tokenizer, token), ["eos_tokens"])
        if conversational and turn_end is not None and turn_end not in sources:
            doubts.append(
                f"The chat template ends an assistant's turn with {token_name(tokenizer, turn_end)}, which is none of "
                f"eos_tokens={list(eos_tokens)}. Add it, unless the models end with something else."
            )
    else:
        named = [
            ("the tokenizer", _listed(tokenizer.eos_token_id)),
            ("the student's generation config", declared),
            ("the chat template", _listed(turn_end) if conversational else []),
            ("the teacher's generation config", declared_ends(teacher, "the teacher")),
            ("the teacher's tokenizer", _listed(teacher_tokenizer and teacher_tokenizer.eos_token_id)),
        ]
        special = special_ids(tokenizer)
        for who, ids in named:
            for id_ in ids:
                if id_ not in special and id_ < len(tokenizer):
                    doubts.append(_doubt_ordinary(tokenizer, who, id_, counts=id_ in own))
                if id_ in special or id_ in own:
                    sources.setdefault(id_, []).append(who)
    eos = tokenizer.eos_token_id
    if not keep_eos:
        eos = _choose_eos(tokenizer, sources, own, turn_end if conversational else None, bool(eos_tokens))
    return EndTokens(dict(sorted(sources.items())), eos, turn_end, frozenset(declared), doubts)


def check_eos_tokens(value: str | Sequence[str] | None) -> list[str] | None:
    """Return the field `eos_tokens` as a list; a single token may be given as it is.

    Raises:
        ValueError: if it holds no token, or something else.
    """
    if value is None:
        return None
    tokens = [value] if isinstance(value, str) else list(value)
    if not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise UserError(f"eos_tokens must be a list of tokens such as ['<|im_end|>'], got {value!r}.")
    return tokens


def find_turn_end(
    tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: dict[str, Any] | None = None
) -> int | None:
    """Return the first special token that the chat template writes after the text of an assistant's last turn.

    None without a chat template, if there is no such token, or for a template that takes no plain conversation.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **(chat_template_kwargs or {}))
    except (TemplateError, TypeError, ValueError, KeyError):  # what templates raise for what they do not take
        return None
    _, mark, tail = text.rpartition(_MARK)
    special = special_ids(tokenizer)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if mark else []
    return next((id_ for id_ in ids if id_ in special), None)


def declared_ends(config: "GenerationConfig | None", who: str = "the model") -> list[int]:
    """Return the ids that a generation config ends with; empty without one.

    Args:
        config ([`~transformers.GenerationConfig`], *optional*): the generation config.
        who (`str`, *optional*, defaults to `"the model"`): whose it is, for the message.

    Raises:
        ValueError: if one of them is no id.
    """
    ids = _listed(None if config is None else config.eos_token_id)
    for id_ in ids:
        if type(id_) is not int or abs(id_) >= 2**31:
            raise UserError(
                f"The generation config of {who} has the eos_token_id {id_!r}, which is no token. Fix its "
                "generation_config.json."
            )
    return ids


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of special tokens, and of others that were added whole; not those of white space."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if str(token).strip())}


def token_name(tokenizer: "PreTrainedTokenizerBase", id_: int) -> str:
    """Return how a message names a token: its text, and its id where the tokenizer has no such token."""
    token = tokenizer.convert_ids_to_tokens(id_) if id_ < len(tokenizer) else None
    return f"the id {id_}" if token is None else repr(token)


def read_generation_config(
    model: "str | PreTrainedModel", revision: str | None = None, trust_remote_code: bool = False
) -> "GenerationConfig | None":
    """Return the generation config of a model, without loading one that is given by name.

    None if there is none to be read, which is for what loads the model to say.
    """
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    from transformers import AutoConfig, GenerationConfig

    options = {"revision": revision or "main"}
    try:
        if has_generation_config(model, **options):
            return GenerationConfig.from_pretrained(model, **options)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError):
        return None
    return GenerationConfig.from_model_config(config)


def has_generation_config(model: str, revision: str = "main") -> bool:
    """Return whether a generation config is with the model or adapter of that name."""
    flags = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{flag}": False for flag in flags}
    from transformers.utils import cached_file  # takes a second, which options need not wait for

    return cached_file(model, "generation_config.json", revision=revision, **quiet) is not None


def adopt_generation_config(model: "PreTrainedModel", adapter: str) -> None:
    """Give the base of an adapter the generation config that was saved with the adapter, if one was."""
    from transformers import GenerationConfig

    if has_generation_config(adapter):
        model.generation_config = GenerationConfig.from_pretrained(adapter)


def check_eos(tokenizer: "PreTrainedTokenizerBase", ends: EndTokens) -> None:
    """Check that something ends a completion, and that it is known which token does so in training data.

    Raises:
        ValueError: with the remedy.
    """
    if ends.eos is not None:
        return
    named = f"several tokens are named: {ends.describe(tokenizer)}" if ends.sources else "nothing names one"
    raise UserError(
        f"The tokenizer {tokenizer.name_or_path!r} has no eos_token, and {named}. Say which ends a completion: "
        "eos_tokens=['<|im_end|>'], for example."
    )


def carry(ends: EndTokens, model: "PreTrainedModel") -> None:
    """Let a model have the tokens, so that what is saved ends with them in `transformers.generate` too."""
    if set(ends.ids) != ends.declared:
        others = [id_ for id_ in ends.ids if id_ != ends.eos]
        model.generation_config.eos_token_id = [*_listed(ends.eos), *others] if others else ends.eos
    config: "PreTrainedConfig" = model.config.get_text_config()
    known = config.eos_token_id
    if ends.eos is not None and ends.eos not in _listed(known):
        config.eos_token_id = [ends.eos, *known] if isinstance(known, list) else ends.eos


def set_eos(tokenizer: "PreTrainedTokenizerBase", ends: EndTokens) -> None:
    """Give the tokenizer its EOS, and a padding token where it has none."""
    if tokenizer.eos_token_id != ends.eos:
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
    """Keep the tokenizer's EOS, unless it is not among those given, or conversations end with one of their own."""
    current = tokenizer.eos_token_id
    if given:
        return current if current in sources else next(iter(sources))
    if turn_end is not None and turn_end not in own:
        return turn_end
    if current is not None:
        return current
    special = special_ids(tokenizer)
    candidates = [id_ for id_ in sources if id_ in special]
    if turn_end is not None:
        return turn_end
    return candidates[0] if len(candidates) == 1 else None


def _doubt_ordinary(tokenizer: "PreTrainedTokenizerBase", who: str, id_: int, counts: bool) -> str:
    effect = "so completions end with it" if counts else "so it is not taken for an end"
    return (
        f"{who[0].upper()}{who[1:]} ends completions with {token_name(tokenizer, id_)} (id {id_}), an ordinary token "
        f"of the tokenizer, {effect}. Fix its generation_config.json, or set eos_tokens to what ends a completion."
    )


def _id_of(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    if token not in (vocabulary := tokenizer.get_vocab()):
        raise UserError(
            f"eos_tokens: {token!r} is no token of {tokenizer.name_or_path!r}, whose special tokens are "
            f"{tokenizer.all_special_tokens}. Name one of its tokens."
        )
    return vocabulary[token]


def _listed(value: Any) -> list[Any]:
    """The values of a field that holds one, several or none."""
    return [each for each in (value if isinstance(value, list) else [value]) if each is not None]
