r"""Align the tokens of two tokenizers over the same text, as pure functions of bytes.

A student with its own tokenizer samples tokens y, and the teacher reads their text as other tokens s. The reward of
the whole completion is log p(s) - log q(y). To give each token of the student its return, this reward is cut into
spans:

- A place in the text is a *certain* cut if no token of the teacher contains the two bytes around it, the second of
  which is ASCII. The teacher's tokens then never cross it, and what comes after it cannot change those before it.
  A space after a word is such a place for most tokenizers.
- A span lies between two certain cuts that also are boundaries of the student's tokens. Its reward is log p of the
  teacher's tokens in it, less log q of the student's.

The reward of a span is credited to the first token of the student *after* it. Only this token shows that the span is
complete: after "he", the teacher's tokens are "he" if " said" follows, but "hello" if "llo" does. Each token of the
span and this next one therefore have the reward in their return. Credited to the last token of the span instead, the
reward of "he" would be missing in the return of " said", but the reward of "hello" not in that of "llo", and the
comparison of the two would be biased. A credit that comes later only adds variance.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ReadText(NamedTuple):
    """What the teacher reads of a completion.

    Attributes:
        text (`str`): the text; bytes that are not UTF-8 are U+FFFD, as when the tokens are decoded.
        ends (`np.ndarray` of shape `(n,)`): number of bytes of the text after each token; a character counts once it
            is complete.
        unread (`int`): tokens at the end that only begin a character which the length limit has cut off.
    """

    text: str
    ends: np.ndarray
    unread: int


def read_text(tokens: Sequence[bytes], is_complete: bool) -> ReadText:
    """Decode the bytes of tokens.

    Args:
        tokens (`Sequence[bytes]`): the bytes of each token of a completion, without its end token.
        is_complete (`bool`): whether the completion ended by itself, so that no character can be completed.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [decoder.decode(token) for token in tokens]
    sizes = [len(part.encode()) for part in parts]
    pending, unread = len(decoder.getstate()[0]), 0
    if is_complete and parts:
        parts.append(decoder.decode(b"", final=True))
        sizes[-1] += len(parts[-1].encode())
    elif pending:
        begun = np.cumsum([len(token) for token in reversed(tokens)])
        unread = int(np.searchsorted(begun, pending, side="right"))
    return ReadText("".join(parts), np.cumsum(sizes, dtype=np.int64), unread)


def certain_cuts(text: bytes, inner_pairs: np.ndarray) -> np.ndarray:
    """Return the places in a text, as numbers of bytes before them, at which the teacher always begins a token.

    Args:
        text (`bytes`): UTF-8.
        inner_pairs (`np.ndarray` of shape `(256, 256)`, bool): pairs of bytes inside a token of the teacher, see
            [`~minillm_trl.models.token_bytes.inner_pairs`].
    """
    codes = np.frombuffer(text, dtype=np.uint8)
    before, after = codes[:-1], codes[1:]
    return 1 + ((after < 128) & ~inner_pairs[before, after]).nonzero()[0]


def credited_tokens(
    student_ends: np.ndarray, teacher_ends: np.ndarray, cuts: np.ndarray, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the student's token to which the log-prob of each token is credited.

    Args:
        student_ends (`np.ndarray` of shape `(n,)`), teacher_ends (`np.ndarray` of shape `(m,)`): bytes of the text
            after each token, in ascending order.
        cuts (`np.ndarray`): places where a span may end, in ascending order, without the end of the text.
        last (`int`): number of the completion's last token, to which the last span is credited: its end token, which
            is not among the n, or token n - 1 of a completion that was cut.

    Returns:
        `tuple[np.ndarray, np.ndarray]` of shapes `(n,)` and `(m,)`.
    """
    bounds = cuts[np.isin(cuts, student_ends) & np.isin(cuts, teacher_ends)]
    credits = np.append(np.searchsorted(student_ends, bounds, side="right"), last)
    students, teachers = (credits[np.searchsorted(bounds, ends, side="left")] for ends in (student_ends, teacher_ends))
    return students, teachers
