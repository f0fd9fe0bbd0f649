"""What `minillm-trl serve-teacher` computes: log-probs of listed tokens, or of its own likeliest, in completions."""

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
from .protocol import VERSION, MessageError, Row
from .top_k import TopK, listed_log_probs, most_likely_tokens


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
            protocol=VERSION,
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
            listed = row.listed
            if listed is not None and listed.numel() and not (listed.min() >= 0 and listed.max() < vocab_size):
                raise MessageError(f"row {number} lists a token outside the first {vocab_size} tokens")
            if not all(0 <= token < size for token in row.prompt):
                raise MessageError(f"row {number} has a prompt token outside the {size} tokens of the model")

    @torch.no_grad()
    def score(self, rows: Sequence[Row], top_k: int | None, temperature: float, vocab_size: int) -> TopK:
        """Return the [`TopK`] `(N, K)` of the N completion tokens, in the order of the rows.

        Args:
            rows (`Sequence[Row]`): rows that [`check`] accepts.
            top_k (`int`, *optional*): number of the model's most likely tokens; None for the listed tokens of the
                rows. Each completion token is added to its own.
            temperature (`float`): temperature of the distribution.
            vocab_size (`int`): leading vocabulary rows to normalise over, those that the student has too.
        """
        device = self.model.device
        length = max((len(row.completion) for row in rows), default=0)
        listed = None if top_k is not None else torch.cat([row.listed for row in rows if row.listed is not None])
        if length == 0:
            width = 1 + (listed.shape[1] if listed is not None else top_k or 0)
            return TopK(torch.zeros(0, width).long(), torch.zeros(0, width), torch.zeros(0))
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
        pieces = []
        for part in token_chunks(len(targets), vocab_size):
            logits = self.head.logits(hidden[part], vocab_size)
            wanted = most_likely_tokens(logits, top_k or 0) if listed is None else listed[part].to(device)
            pieces.append(listed_log_probs(logits, wanted, targets[part], temperature))
        return TopK(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
