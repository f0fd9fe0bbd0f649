"""The bytes that each token of a tokenizer stands for, so that tokens of two tokenizers can be compared."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

_SPACE = "\u2581"  # how SentencePiece writes a space


def token_bytes(tokenizer: PreTrainedTokenizerBase, who: str) -> list[bytes]:
    r"""Return the bytes of each token by its id; those of an added token, special or not, are its name's.

    Ids that no token has, as some tokenizers leave gaps before their added tokens, have no bytes.

    Concatenated, the tokens of a text give its UTF-8 bytes. A single token may end inside a character.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): a fast tokenizer that decodes by bytes (GPT-2, Llama 3,
            Qwen, SmolLM2), or as SentencePiece does (Llama 2, Gemma).
        who (`str`): "student" or "teacher", for the message.

    Raises:
        UserError: for any other tokenizer.
    """
    kind = _decoder(tokenizer) if tokenizer.is_fast else None
    if kind is None:
        raise UserError(
            f"The tokenizer of the {who}, {tokenizer.name_or_path!r}, is neither byte-level nor SentencePiece's, so "
            "the bytes of its tokens are unknown, and cross_tokenizer=True cannot align them. Choose another model."
        )
    codes = _byte_level() if kind == "ByteLevel" else {}
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
    vocab = tokenizer.get_vocab()
    table = [b""] * (1 + max(vocab.values()))
    for token, id_ in vocab.items():
        if id_ in added:
            table[id_] = added[id_].encode()
        elif kind == "ByteLevel":
            table[id_] = token.translate(codes).encode("latin-1")
        elif len(token) == 6 and token.startswith("<0x"):
            table[id_] = bytes([int(token[3:5], 16)])
        else:
            table[id_] = token.replace(_SPACE, " ").encode()
    return table


def inner_pairs(table: Sequence[bytes]) -> np.ndarray:
    """Return which pairs of neighbouring bytes occur inside a token, as a bool array `(256, 256)`."""
    found = np.zeros((256, 256), dtype=bool)
    whole = np.frombuffer(b"".join(table), dtype=np.uint8)
    ends = np.cumsum([len(token) for token in table if token])
    inside = np.ones(len(whole), dtype=bool)
    inside[ends - 1] = False  # the last byte of a token and the first of the next are no pair
    first = inside.nonzero()[0]
    found[whole[first], whole[first + 1]] = True
    return found


def _decoder(tokenizer: Any) -> str | None:
    """Return how the tokens of a fast tokenizer become text; None for other ways than the two that are known."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return "ByteLevel"
    replaces = any(part.get("type") == "Replace" and part.get("content") == " " for part in parts)
    if replaces and "ByteFallback" in kinds and {*kinds} <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return "SentencePiece"
    return None


def _byte_level() -> dict[int, int]:
    """Return the byte of each character, by its code, in which byte-level tokenizers write their tokens.

    Printable characters of Latin-1 stand for their own byte; the other bytes have the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}
