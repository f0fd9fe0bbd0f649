"""Every completion of a tiny vocabulary, with a row of logits for each prefix: expectations become sums."""

from dataclasses import dataclass
from itertools import product

import torch


@dataclass
class Tabular:
    """All completions of at most `horizon` tokens over `vocab` tokens, of which token 0 may end a completion.

    Attributes:
        ids, mask: `(N, T)`, right-padded with token 0, as by a tokenizer whose padding is its end token.
        prefixes: `(N, T)`, the row of logits that predicts each token; arbitrary on padding.
        num_prefixes: number of rows.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    prefixes: torch.Tensor
    num_prefixes: int
    vocab: int

    @classmethod
    def build(cls, vocab: int = 4, horizon: int = 4, eos: bool = True) -> "Tabular":
        """Without `eos` no token ends a completion, so all have `horizon` tokens."""
        ordinary = range(1 if eos else 0, vocab)
        prefixes = [prefix for length in range(horizon) for prefix in product(ordinary, repeat=length)]
        rows = {prefix: i for i, prefix in enumerate(prefixes)}
        completions = list(product(ordinary, repeat=horizon))
        if eos:
            completions += [(*prefix, 0) for prefix in prefixes]
        ids = torch.zeros(len(completions), horizon, dtype=torch.long)
        mask = torch.zeros(len(completions), horizon, dtype=torch.bool)
        row_index = torch.zeros(len(completions), horizon, dtype=torch.long)
        for n, completion in enumerate(completions):
            for t, token in enumerate(completion):
                ids[n, t], mask[n, t], row_index[n, t] = token, True, rows[completion[:t]]
        return cls(ids, mask, row_index, len(rows), vocab)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Next-token distributions along every completion, `(num_prefixes, V) -> (N, T, V)`."""
        return torch.log_softmax(logits, dim=-1)[self.prefixes]

    def token_logps(self, logits: torch.Tensor) -> torch.Tensor:
        return self.log_probs(logits).gather(2, self.ids[..., None]).squeeze(2)

    def sequence_logps(self, logits: torch.Tensor) -> torch.Tensor:
        return self.token_logps(logits).masked_fill(~self.mask, 0.0).sum(dim=1)


def sequence_reverse_kl(sequence_logps: torch.Tensor, teacher_sequence_logps: torch.Tensor) -> torch.Tensor:
    """KL(q || p) over whole completions."""
    return (sequence_logps.exp() * (sequence_logps - teacher_sequence_logps)).sum()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
