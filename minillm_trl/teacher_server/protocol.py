"""Requests and answers between the trainer and `minillm-trl serve-teacher`: tensors in the safetensors format.

`POST /score?top_k=K&temperature=T&vocab_size=V&model=FINGERPRINT` with the completions to score, see [`encode_rows`].
The answer has the [`TopK`] of each completion token in the order of the rows, see [`encode_answer`]. A fingerprint
other than the served model's is answered with status 409.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .top_k import TopK

SERVER = "minillm-trl"  # the name in the answer to `GET /info`
CONTENT_TYPE = "application/octet-stream"


class Row(NamedTuple):
    """A completion to score.

    Attributes:
        prompt (`list[int]`): token ids before the completion, at least one.
        completion (`list[int]`): token ids to score.
    """

    prompt: list[int]
    completion: list[int]


class MessageError(ValueError):
    """A message that does not follow the protocol."""


def encode_rows(rows: Sequence[Row]) -> bytes:
    """Return the body of a request."""
    return save(_row_tensors(rows))


def _row_tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    lengths = [[len(row.prompt), len(row.completion)] for row in rows]
    return {
        "tokens": torch.tensor([token for row in rows for part in row for token in part], dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def decode_rows(body: bytes) -> list[Row]:
    """Read the body of a request.

    Raises:
        MessageError: if it is not one.
    """
    tensors = _read(body, {"tokens": 1, "lengths": 2})
    if tensors["lengths"].shape[1] != 2 or any(tensor.dtype != torch.int32 for tensor in tensors.values()):
        raise MessageError("tokens and the two lengths of each row must be of type int32")
    lengths = tensors["lengths"].flatten().tolist()
    if sum(lengths) != len(tensors["tokens"]) or min(lengths, default=0) < 0:
        raise MessageError("the lengths do not fit the tokens")
    parts = [part.tolist() for part in tensors["tokens"].split(lengths)]
    return [Row(prompt, completion) for prompt, completion in zip(parts[::2], parts[1::2], strict=True)]


def encode_answer(top: TopK) -> bytes:
    """Return the body of an answer: ids and log-probs `(N, K)`, and those of the rest `(N,)`, for N tokens."""
    return save(_answer_tensors(top))


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
    tensors = _read(body, {"ids": 2, "logps": 2, "rest": 1})
    top = TopK(tensors["ids"].long(), tensors["logps"], tensors["rest"])
    lengths = [len(row.completion) for row in rows]
    if top.ids.shape != top.logps.shape or not sum(lengths) == len(top.ids) == len(top.rest):
        raise MessageError("the answer does not have a result for each token")
    return list(top.pack().split(lengths))


def _read(body: bytes, dimensions: dict[str, int]) -> dict[str, torch.Tensor]:
    try:
        tensors = load(body)
    except SafetensorError as error:
        raise MessageError(f"the body is not in the safetensors format: {error}") from error
    if {name: tensor.dim() for name, tensor in tensors.items()} != dimensions:
        raise MessageError(f"the body has the tensors {sorted(tensors)}, expected {sorted(dimensions)}")
    return tensors
