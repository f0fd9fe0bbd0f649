"""What `minillm-trl serve-teacher` computes: the top-k log-probs of the tokens of completions."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.context import max_context
from ..models.end_tokens import declared_ends
from ..models.fingerprints import weights_fingerprint
from ..models.fused_head import token_chunks
from ..models.lm_head import LMHead, check_head
from ..models.teacher import teacher_hidden_states
from ..rollouts.sampling import left_pad
from .identity import ServerIdentity, TokenizerIdentity
from .protocol import MessageError, Row
from .top_k import TopK, largest_log_probs


class TeacherService:
    """A teacher that scores completions, a batch of similar lengths at a time.

    Args:
        model ([`~transformers.PreTrainedModel`]): from [`~minillm_trl.models.teacher.load_teacher`], on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        name (`str`): its name for messages and records.
        batch_size (`int`): rows of one forward pass.

    Raises:
        UserError: if the LM head cannot be reproduced, see [`~minillm_trl.models.lm_head.check_head`].
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int = 8):
        check_head(model, "teacher")
        self.model = model
        self.batch_size = batch_size
        self.head = LMHead.of(model).frozen(model.device)
        ends = {*declared_ends(model.generation_config, "the teacher")}
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        self.identity = ServerIdentity(
            model=name,
            fingerprint=weights_fingerprint(model),
            vocab_size=self.head.weight.shape[0],
            max_context=max_context(model),
            tokenizer=TokenizerIdentity.of(tokenizer),
            eos_token_ids=sorted(ends),
        )

    def check(self, rows: Sequence[Row], vocab_size: int) -> None:
        """Check that the model can score the rows.

        Raises:
            MessageError: naming the row.
        """
        limit, size = self.identity.max_context, self.head.weight.shape[0]
        if not 0 < vocab_size <= size:
            raise MessageError(f"vocab_size={vocab_size}, but the LM head has {size} rows")
        for number, row in enumerate(rows):
            length = len(row.prompt) + len(row.completion)
            if not row.prompt:
                raise MessageError(f"row {number} has no token before its completion")
            if limit is not None and length > limit:
                raise MessageError(f"row {number} has {length} tokens, but the model's context has {limit}")
            if not all(0 <= token < vocab_size for token in row.completion):
                raise MessageError(f"row {number} has a completion token outside the first {vocab_size} tokens")
            if not all(0 <= token < size for token in row.prompt):
                raise MessageError(f"row {number} has a prompt token outside the {size} tokens of the model")

    @torch.no_grad()
    def score(self, rows: Sequence[Row], top_k: int, temperature: float, vocab_size: int) -> TopK:
        """Return the [`TopK`] `(N, K)` of the N completion tokens, in the order of the rows.

        Args:
            rows (`Sequence[Row]`): rows that [`check`] accepts.
            top_k (`int`): number of most likely tokens; each completion token is added to its own.
            temperature (`float`): temperature of the distribution.
            vocab_size (`int`): leading vocabulary rows to normalise over, those that the student has too.
        """
        device = self.model.device
        length = max((len(row.completion) for row in rows), default=0)
        if length == 0:
            return TopK(torch.zeros(0, top_k + 1).long(), torch.zeros(0, top_k + 1), torch.zeros(0))
        prompt_ids, prompt_mask = left_pad([row.prompt for row in rows], 0)
        completion_ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            completion_ids[number, : len(row.completion)] = torch.tensor(row.completion, dtype=torch.long)
            mask[number, : len(row.completion)] = True
        states = teacher_hidden_states(
            self.model,
            torch.cat([prompt_ids, completion_ids], dim=1).to(device),
            torch.cat([prompt_mask, mask], dim=1).to(device),
            length,
            self.batch_size,
        )
        hidden, targets = states[mask.to(device)], completion_ids[mask].to(device)
        pieces = [
            largest_log_probs(self.head.logits(hidden[part], vocab_size), targets[part], top_k, temperature)
            for part in token_chunks(len(targets), vocab_size)
        ]
        return TopK(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
