"""Messages between trainer and `serve-teacher`: the round trip, and bodies that are refused."""

import pytest
import torch
from safetensors.torch import save

from minillm_trl.teacher_server.protocol import MessageError, Row, decode_rows, encode_rows


def test_rows_survive_the_way_to_the_server():
    rows = [Row([1, 2], [3]), Row([4], []), Row([5], [6, 7])]
    assert decode_rows(encode_rows(rows)) == rows


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
