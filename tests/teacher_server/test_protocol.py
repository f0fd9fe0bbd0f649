"""Messages between trainer and `serve-teacher`: the round trip, and bodies that are refused."""

import pytest
import torch
from safetensors.torch import save

from minillm_trl.teacher_server.protocol import (
    MessageError,
    Row,
    decode_answer,
    decode_rows,
    encode_answer,
    encode_rows,
)
from minillm_trl.teacher_server.top_k import TopK


def test_rows_survive_the_way_to_the_server():
    rows = [Row([1, 2], [3]), Row([4], []), Row([5], [6, 7])]
    assert decode_rows(encode_rows(rows)) == rows
    listed = torch.arange(6, dtype=torch.int32).view(3, 2)
    parts = (listed[:1], listed[1:1], listed[1:])
    found = decode_rows(encode_rows([row._replace(listed=part) for row, part in zip(rows, parts, strict=True)]))
    assert [row._replace(listed=None) for row in found] == rows
    assert all(map(torch.equal, (row.listed for row in found), parts))


@pytest.mark.parametrize("lists", [True, False])
def test_answers_survive_the_way_back(lists: bool):
    ids, logps = torch.tensor([[8, 9, 3], [8, 7, 6], [2, 1, 7]]), -torch.arange(9.0).view(3, 3)
    top = TopK(ids, logps, torch.tensor([-1.0, -2.0, -3.0]))
    listed = ids[:, :2].int()
    rows = [Row([1, 2], [3], listed[:1]), Row([4], [], listed[:0]), Row([5], [6, 7], listed[1:])]
    rows = rows if lists else [row._replace(listed=None) for row in rows]
    body = encode_answer(top, with_ids=not lists)
    found = TopK.unpack(torch.cat(decode_answer(body, rows)))
    assert all(map(torch.equal, found, top))
    with pytest.raises(MessageError):
        decode_answer(body, rows[:2])
    with pytest.raises(MessageError):
        decode_answer(encode_answer(top, with_ids=lists), rows)


def test_listed_tokens_that_do_not_fit_the_completions():
    body = encode_rows([Row([1], [2, 3], torch.zeros(1, 4, dtype=torch.int32))])
    with pytest.raises(MessageError, match="listed"):
        decode_rows(body)


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (torch.tensor([1, 2, 3]), [[2, 2]]),
        (torch.tensor([1, 2, 3]), [[4, -1]]),
        (torch.tensor([1, 2, 3]), [[1, 1, 1]]),
        (torch.tensor([1, 2, 3]), [[1], [1], [1]]),
        (torch.tensor([1.5, 2.0, 3.0]), [[1, 2]]),
    ],
)
def test_bodies_that_do_not_follow_the_protocol(tokens: torch.Tensor, lengths: list[list[int]]):
    tokens = tokens if tokens.is_floating_point() else tokens.int()
    with pytest.raises(MessageError):
        decode_rows(save({"tokens": tokens, "lengths": torch.tensor(lengths, dtype=torch.int32)}))
    with pytest.raises(MessageError):
        decode_rows(b"no tensors")
