"""A vLLM server, or another one whose `/v1/completions` returns `prompt_logprobs`, as the trainer sees it.

vLLM returns the k most likely tokens and the actual one of each position of a prompt, at temperature 1. The
probability of the rest is one minus their sum, so it has the rounding error of float32 sums.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch

from .identity import Scoring, ServerIdentity, TeacherServerError
from .protocol import Row
from .scoring_server import TransientError, UnknownRouteError, request_json
from .top_k import TopK

# vLLM sends float32 log-probs, and this in place of -inf
_NO_PROBABILITY = -9999.0
# Smaller remainders are rounding errors of a sum of float32 probabilities
_SMALLEST_REST = 1e-6


@dataclass(frozen=True)
class VllmServer:
    """A server with vLLM's `/v1/completions` at `url`."""

    url: str

    async def identity(self, session: aiohttp.ClientSession) -> ServerIdentity:
        """Ask the server for its first model."""
        answer = await request_json(session, "GET", f"{self.url}/v1/models")
        try:
            model = answer["data"][0]
            limit = model.get("max_model_len")
            # one token is generated after the sequence
            return ServerIdentity(model["id"], max_context=None if limit is None else int(limit) - 1)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise TeacherServerError(
                f"{self.url}/v1/models lists no model. Give the address of minillm-trl serve-teacher or of vLLM."
            ) from error

    async def encode(self, session: aiohttp.ClientSession, model: str, text: str) -> list[int] | None:
        """Return the token ids of a text; None if the server does not offer its tokenizer."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            answer = await request_json(session, "POST", f"{self.url}/tokenize", json=body)
        except UnknownRouteError:
            return None
        try:
            return list(answer["tokens"])
        except (KeyError, TypeError) as error:
            raise TransientError(f"a broken answer ({type(error).__name__}: {error})") from error

    async def score(self, session: aiohttp.ClientSession, rows: Sequence[Row], scoring: Scoring) -> list[torch.Tensor]:
        """Request the log-probs of whole sequences, and keep those of the completions."""
        body = {
            "model": scoring.identity.model,
            "prompt": [row.prompt + row.completion for row in rows],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": scoring.top_k,
        }
        answer = await request_json(session, "POST", f"{self.url}/v1/completions", json=body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [choice["prompt_logprobs"] for choice in choices]
            return [
                pack_row(row, positions, scoring.top_k, scoring.vocab_size)
                for row, positions in zip(rows, found, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise TransientError(f"a broken answer ({type(error).__name__}: {error})") from error


def pack_row(row: Row, positions: Sequence[Mapping[str, Any] | None], top_k: int, vocab_size: int) -> torch.Tensor:
    """Return the packed [`TopK`] of a row's completion, `(t, 2K + 1)` with K = top_k + 1.

    Args:
        row ([`Row`]): the row.
        positions (`Sequence[Mapping]`): for each token of the sequence, log-probs by token id, as vLLM sends them.
        top_k (`int`): number of most likely tokens.
        vocab_size (`int`): tokens of the student. Others are left out, and the distribution is normalised without
            them.

    Raises:
        ValueError: if `positions` do not belong to the row.
    """
    if len(positions) != len(row.prompt) + len(row.completion):
        raise ValueError(f"{len(positions)} positions for {len(row.prompt) + len(row.completion)} tokens")
    ids = torch.empty(len(row.completion), top_k + 1, dtype=torch.long)
    logps = torch.empty(len(row.completion), top_k + 1, dtype=torch.float64)
    rest = torch.empty(len(row.completion), dtype=torch.float64)
    for place, token in enumerate(row.completion):
        listed = _log_probs(positions[len(row.prompt) + place], vocab_size)
        if token not in listed or len(listed) > top_k + 1:
            raise ValueError(f"position {place} has {len(listed)} log-probs, or lacks the token {token}")
        # repeat the token, which changes nothing, where the token is one of the k
        names = [*listed, *[token] * (top_k + 1 - len(listed))]
        ids[place] = torch.tensor(names)
        logps[place] = torch.tensor([listed[name] for name in names])
        rest[place] = math.log(max(1.0 - math.fsum(map(math.exp, listed.values())), _SMALLEST_REST))
    return TopK(ids, logps, rest).pack()


def _log_probs(position: Mapping[str, Any] | None, vocab_size: int) -> dict[int, float]:
    """Return log-probs by token id of the first `vocab_size` tokens, normalised without the others."""
    values = {int(name): float(entry["logprob"]) for name, entry in (position or {}).items()}
    others = math.fsum(math.exp(value) for name, value in values.items() if name >= vocab_size)
    shift = math.log1p(-min(others, 1.0 - _SMALLEST_REST))
    return {
        name: -math.inf if value <= _NO_PROBABILITY else value - shift
        for name, value in values.items()
        if name < vocab_size
    }
