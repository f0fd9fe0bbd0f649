"""Requests and answers between the trainer and `minillm-trl serve-teacher`: tensors in the safetensors format.

`POST /score?temperature=T&vocab_size=V&model=FINGERPRINT` with the completions to score, see [`encode_rows`]. Either
the rows list the tokens whose log-probs are wanted, or `top_k=K` asks for the teacher's K most likely ones. The answer
has the [`TopK`] of each completion token in the order of the rows, see [`encode_answer`]. A fingerprint other than the
served model's is answered with status 409.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .top_k import TopK

SERVER = "minillm-trl"  # the name in the answer to `GET /info`
VERSION = 2  # of these messages; 1, which had no listed tokens, is not named in the answer to `GET /info`
CONTENT_TYPE = "application/octet-stream"


class Row(NamedTuple):
    """A completion to score.

    Attributes:
        prompt (`list[int]`): token ids before the completion, at least one.
        completion (`list[int]`): token ids to score.
        listed (`torch.Tensor` of shape `(t, k)`, int32, *optional*): tokens whose log-probs are wanted at each of
            them; None for the teacher's most likely tokens.
    """

    prompt: list[int]
    completion: list[int]
    listed: torch.Tensor | None = None


class MessageError(ValueError):
    """A message that does not follow the protocol."""


def encode_rows(rows: Sequence[Row]) -> bytes:
    """Return the body of a request. All rows list tokens, or none."""
    listed = [row.listed for row in rows if row.listed is not None]
    return save(_row_tensors(rows) | ({"listed": torch.cat(listed).int()} if listed else {}))


def _row_tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    lengths = [[len(row.prompt), len(row.completion)] for row in rows]
    tokens = [token for row in rows for part in row[:2] for token in part]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def decode_rows(body: bytes) -> list[Row]:
    """Read the body of a request.

    Raises:
        MessageError: if it is not one.
    """
    tensors = _read(body, {"tokens": 1, "lengths": 2}, {"listed": 2})
    if tensors["lengths"].shape[1] != 2 or any(tensor.dtype != torch.int32 for tensor in tensors.values()):
        raise MessageError("tokens, listed tokens and the two lengths of each row must be of type int32")
    lengths = tensors["lengths"].flatten().tolist()
    if sum(lengths) != len(tensors["tokens"]) or min(lengths, default=0) < 0:
        raise MessageError("the lengths do not fit the tokens")
    parts = [part.tolist() for part in tensors["tokens"].split(lengths)]
    listed: Sequence[torch.Tensor | None] = [None] * (len(parts) // 2)
    if "listed" in tensors:
        if len(tensors["listed"]) != sum(lengths[1::2]):
            raise MessageError("the listed tokens do not fit the completions")
        listed = tensors["listed"].split(lengths[1::2])
    return [Row(*row) for row in zip(parts[::2], parts[1::2], listed, strict=True)]


def encode_answer(top: TopK, with_ids: bool) -> bytes:
    """Return the body of an answer: log-probs `(N, K)`, those of the rest `(N,)`, for N tokens; their ids on request.

    Args:
        top ([`TopK`] of N tokens): with the token of the completion as the last of the K.
        with_ids (`bool`): whether to send the ids, which whoever listed the tokens knows.
    """
    tensors = _answer_tensors(top)
    return save(tensors if with_ids else {name: tensors[name] for name in ("logps", "rest")})


def encode_scored_rows(rows: Sequence[Row], top: TopK) -> bytes:
    """Return rows together with the answer to them, for a file."""
    return save(_row_tensors(rows) | _answer_tensors(top))


def _answer_tensors(top: TopK) -> dict[str, torch.Tensor]:
    return {
        "ids": top.ids.int().cpu().contiguous(),
        "logps": top.logps.float().cpu().contiguous(),
        "rest": top.rest.float().cpu().contiguous(),
    }


def decode_answer(body: bytes, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Read the body of an answer; return the packed [`TopK`] of each row, `(t, 2K + 1)`.

    Raises:
        MessageError: if it is not the answer to `rows`.
    """
    listed = [row.listed for row in rows if row.listed is not None]
    lengths = [len(row.completion) for row in rows]
    if listed:
        tensors = _read(body, {"logps": 2, "rest": 1})
        targets = torch.tensor([token for row in rows for token in row.completion], dtype=torch.long)
        ids = torch.cat([torch.cat(listed).long(), targets[:, None]], dim=1)
    else:
        tensors = _read(body, {"ids": 2, "logps": 2, "rest": 1})
        ids = tensors["ids"].long()
    top = TopK(ids, tensors["logps"], tensors["rest"])
    if top.ids.shape != top.logps.shape or not sum(lengths) == len(top.ids) == len(top.rest):
        raise MessageError("the answer does not have a result for each token")
    return list(top.pack().split(lengths))


def _read(body: bytes, dimensions: dict[str, int], optional: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    try:
        tensors = load(body)
    except SafetensorError as error:
        raise MessageError(f"the body is not in the safetensors format: {error}") from error
    found = {name: tensor.dim() for name, tensor in tensors.items()}
    if found not in (dimensions, dimensions | (optional or {})):
        raise MessageError(f"the body has the tensors {sorted(tensors)}, expected {sorted(dimensions)}")
    return tensors
