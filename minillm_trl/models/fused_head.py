"""Compute log-probs, entropy and full-vocabulary divergences from hidden states, one chunk of tokens at a time.

The logits of a whole batch, (B, T, V) for student and teacher, never exist. Each chunk of tokens is projected through
the LM heads and reduced to a few numbers per token. If these numbers determine the loss of a token, its gradient is
computed immediately, while the chunk's logits exist, so the backward pass projects nothing again. Only completion
tokens inside the mask are scored. `add_scoring` runs the computation inside the model's own forward, so that DDP,
FSDP, DeepSpeed, PEFT and autocast treat it like any other forward pass.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..divergences import reverse_kl
from .divergence_gradients import Divergence
from .forward_methods import override_forward
from .head_gradients import add_gradients, cast_gradient
from .lm_head import LMHead, TeacherHead, completion_hidden_states
from .token_scores import TokenLoss, TokenScores, score_logits, score_logits_in_place

# Elements of one chunk's logits. Peak memory is a small multiple of this, whatever B, T and V are. In float32 a chunk
# exceeds the 32 MiB above which glibc maps each block separately; smaller blocks would come from the heap, which
# fragments to gigabytes.
CHUNK_ELEMENTS = 2**24

# Chunks that have as many logits together as a large head's gradient has elements
_CHUNKS_A_GRADIENT = 4


class ScoreRequest(NamedTuple):
    """Sequences to score. Their last T columns are the completions.

    Attributes:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P+T)`): left-padded prompts, right-padded completions.
        completion_mask (`torch.Tensor` of shape `(B, T)`): True on the tokens to score.
        temperature (`float`): temperature of `logps` and `entropy`.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H_teacher)`, *optional*): the teacher's last hidden
            states at the positions that predict the completion's tokens.
        kd_temperature (`float`, *optional*): temperature of `divergence`; None means `temperature`.
        divergence (`Callable`): divergence of student and teacher: a function of `divergences`, or a
            `functools.partial` of one that fixes its parameter.
        loss (`Callable`, *optional*): maps the [`TokenScores`] `(n,)` of some tokens and their flat indices `(n,)` in
            `(B, T)` to their losses `(n,)`. The loss of a token may depend only on the scores of this token.
        half (`torch.Tensor` of shape `(B,)`, *optional*): 0 or 1, the half that each completion belongs to in
            `term_gradients`.
        measure_reverse_kl (`bool`): whether to score the reverse KL besides the divergence.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    temperature: float = 1.0
    teacher_hidden_states: torch.Tensor | None = None
    kd_temperature: float | None = None
    divergence: Divergence = reverse_kl
    loss: TokenLoss | None = None
    half: torch.Tensor | None = None
    measure_reverse_kl: bool = False

    @property
    def divergence_temperature(self) -> float:
        return self.kd_temperature or self.temperature

    @property
    def completion_ids(self) -> torch.Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def score(
        self, hidden_states: torch.Tensor, head: LMHead, vocab_size: int, teacher_head: TeacherHead | None
    ) -> TokenScores:
        """Score the request from the model's hidden states `(B, T, H)`, see [`score_hidden_states`]."""
        return score_hidden_states(hidden_states, head, self, vocab_size, teacher_head)


def chunk_elements(gradient_elements: int = 0) -> int:
    """Return the number of logits of a chunk.

    Each chunk reads and writes the whole gradient of the head, which is much more than its own logits if the
    vocabulary is large. So a chunk may have a fourth of the gradient's elements: its few tensors of that size then
    take about as much memory as the gradient, which exists anyway.

    Args:
        gradient_elements (`int`, *optional*, defaults to `0`): elements of the gradient of the head's weight, V * H; 0
            for a head that is not trained.
    """
    return max(CHUNK_ELEMENTS, gradient_elements // _CHUNKS_A_GRADIENT)


def token_chunks(num_tokens: int, vocab_size: int, gradient_elements: int = 0) -> list[slice]:
    """Return the parts of `num_tokens` tokens that are projected together, of at most [`chunk_elements`] logits each.

    No tokens make one empty chunk, whose scores are empty but have a graph.
    """
    size = max(1, chunk_elements(gradient_elements) // vocab_size)
    return [slice(start, start + size) for start in range(0, max(num_tokens, 1), size)]


@dataclasses.dataclass(frozen=True)
class _MaskedTokens:
    """The N tokens inside a request's mask, out of B * T, with what predicts them.

    Attributes:
        rows (`torch.Tensor` of shape `(N,)`): flat indices in `(B, T)`.
        hidden (`torch.Tensor` of shape `(N, H)`): the student's hidden states.
        targets (`torch.Tensor` of shape `(N,)`): token ids.
        teacher_hidden (`torch.Tensor` of shape `(N, H_teacher)`, *optional*): the teacher's hidden states.
        teacher_head ([`TeacherHead`], *optional*): the teacher's head.
        vocab_size (`int`): vocabulary rows in use.
        chunks (`list[slice]`): parts of the N tokens that are projected together.
    """

    rows: torch.Tensor
    hidden: torch.Tensor
    targets: torch.Tensor
    teacher_hidden: torch.Tensor | None
    teacher_head: TeacherHead | None
    vocab_size: int
    chunks: list[slice]

    @classmethod
    def of(
        cls,
        hidden_states: torch.Tensor,
        request: ScoreRequest,
        vocab_size: int,
        teacher_head: TeacherHead | None,
        gradient_elements: int,
    ) -> "_MaskedTokens":
        rows = request.completion_mask.flatten().nonzero().squeeze(1)
        hidden = hidden_states.flatten(0, 1)[rows]
        targets = request.completion_ids.flatten()[rows]
        teacher_hidden = request.teacher_hidden_states
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.flatten(0, 1)[rows]
        chunks = token_chunks(len(rows), vocab_size, gradient_elements)
        return cls(rows, hidden, targets, teacher_hidden, teacher_head, vocab_size, chunks)

    def teacher_logits(self, part: slice, student_logits: torch.Tensor) -> torch.Tensor | None:
        """Return the teacher's logits `(n, V)` of a chunk; None without the teacher's hidden states."""
        if self.teacher_hidden is None:
            return None
        if self.teacher_head is None:
            raise ValueError("teacher_hidden_states need a teacher_head. Pass the teacher's LMHead.")
        return self.teacher_head.teacher_logits(self.teacher_hidden[part], self.vocab_size, student_logits)


def score_hidden_states(
    hidden_states: torch.Tensor,
    head: LMHead,
    request: ScoreRequest,
    vocab_size: int,
    teacher_head: TeacherHead | None = None,
) -> TokenScores:
    r"""Score the tokens of completions from the hidden states that predict them.

    With logits z = head(h): `logps` = log softmax(z / temperature)[y_t], `entropy` is the entropy of the same
    distribution, and `divergence` compares softmax(z / kd_temperature) with softmax(teacher_head(h_teacher) /
    kd_temperature).

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, H)`): carries the gradient, as do the head's tensors.
        head ([`LMHead`]): the student's head.
        request ([`ScoreRequest`]): tokens, mask, temperatures and the teacher's hidden states.
        vocab_size (`int`): number of leading vocabulary rows that both models share; other rows are left out of both
            distributions.
        teacher_head ([`TeacherHead`], *optional*): required with `request.teacher_hidden_states`. Receives no
            gradient.

    Returns:
        [`TokenScores`]. Memory beyond the inputs and their gradients is bounded by [`chunk_elements`], not by
        B * T * V.
    """
    loss = term_gradients = None
    is_trained = request.loss is not None and torch.is_grad_enabled()
    gradient_elements = head.weight.numel() if is_trained and head.weight.requires_grad else 0
    tokens = _MaskedTokens.of(hidden_states, request, vocab_size, teacher_head, gradient_elements)
    if request.loss is not None and is_trained:
        scores = _score_with_loss(tokens, head, request, request.loss)
        loss, term_gradients = scores.loss, scores.term_gradients
    else:
        scores = _score_without_loss(tokens, head, request)
        if request.loss is not None:
            loss = request.loss(scores, tokens.rows).sum()

    def scatter(flat: torch.Tensor) -> torch.Tensor:
        full = flat.new_zeros(request.completion_mask.numel()).index_put((tokens.rows,), flat)
        return full.view_as(request.completion_mask)

    divergence, measured = (
        None if values is None else scatter(values) for values in (scores.divergence, scores.reverse_kl)
    )
    return TokenScores(scatter(scores.logps), scatter(scores.entropy), divergence, measured, loss, term_gradients)


def _score_without_loss(tokens: _MaskedTokens, head: LMHead, request: ScoreRequest) -> TokenScores:
    """Return scores `(N,)`, with a graph if gradients are enabled; the backward pass recomputes the logits."""

    def score_chunk(hidden: torch.Tensor, part: slice) -> TokenScores:
        logits = head.logits(hidden, tokens.vocab_size)
        with torch.no_grad():
            teacher_logits = tokens.teacher_logits(part, logits.detach())
        return score_logits(
            logits,
            tokens.targets[part],
            teacher_logits,
            request.temperature,
            request.divergence_temperature,
            request.divergence,
            request.measure_reverse_kl,
        )

    if torch.is_grad_enabled():
        chunks = [checkpoint(score_chunk, tokens.hidden[part], part, use_reentrant=False) for part in tokens.chunks]
    else:
        chunks = [score_chunk(tokens.hidden[part], part) for part in tokens.chunks]
    return _concatenate(chunks)


def _score_with_loss(tokens: _MaskedTokens, head: LMHead, request: ScoreRequest, loss_of: TokenLoss) -> TokenScores:
    """Return detached scores `(N,)` and the loss, whose gradient is computed together with the scores."""
    term_gradients = membership = None
    if request.half is not None:
        half = request.half[tokens.rows // request.completion_mask.shape[1]]
        membership = torch.stack([half == 0, half == 1])  # (2, N)
        term_gradients = torch.zeros(2, 2, tokens.vocab_size, device=tokens.rows.device)

    def loss_of_chunk(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, TokenScores, torch.Tensor]:
        targets, teacher_logits = tokens.targets[part], tokens.teacher_logits(part, logits)
        scores, gradient = score_logits_in_place(
            logits,
            targets,
            teacher_logits,
            request.temperature,
            request.divergence_temperature,
            request.divergence,
            request.measure_reverse_kl,
        )
        # The loss is elementwise in the scores, so a graph of these few numbers is enough: the chain rule to the
        # logits is in closed form.
        with torch.enable_grad():
            inputs = [score.requires_grad_() for score in (scores.logps, scores.divergence) if score is not None]
            loss = loss_of(scores, tokens.rows[part]).sum()
            found = torch.autograd.grad(loss, inputs, materialize_grads=True)
        halves = None
        if membership is not None and term_gradients is not None:
            halves = membership[:, part], term_gradients
        return loss, scores, gradient(*found, halves=halves)

    loss, logps, entropy, divergence, measured = _LossThroughHead.apply(
        tokens.hidden, head.weight, head.bias, head, tokens.vocab_size, tokens.chunks, loss_of_chunk
    )
    return TokenScores(logps, entropy, divergence, measured, loss, term_gradients)


def _concatenate(chunks: Sequence[TokenScores]) -> TokenScores:
    """Join the scores of chunks; their losses are dropped."""

    def join(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        known = [part for part in parts if part is not None]  # all of them, or none
        return torch.cat(known) if known else None

    return TokenScores(
        torch.cat([chunk.logps for chunk in chunks]),
        torch.cat([chunk.entropy for chunk in chunks]),
        join([chunk.divergence for chunk in chunks]),
        join([chunk.reverse_kl for chunk in chunks]),
    )


class _LossThroughHead(torch.autograd.Function):
    """Sum a loss over chunks of tokens and compute its gradient chunk by chunk in the forward pass.

    The backward pass only scales the stored gradients of hidden states `(N, H)` and head `(V, H)`, in at least
    float32. Under autocast, products have its dtype, and everything between them is in float32. In float16 training
    these gradients are computed before the loss scale is applied, so each chunk is scaled to float16's range
    separately.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, vocab_size, chunks, loss_of_chunk):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        head = dataclasses.replace(
            head,
            weight=weight.detach()[:vocab_size].to(dtype),
            bias=None if bias is None else bias.detach()[:vocab_size].to(dtype),
            packed=None,
        )
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
        gradients = {
            name: torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for name, tensor in inputs.items()
            if tensor is not None and tensor.requires_grad
        }
        losses, scored = [], []
        with torch.autocast(device, enabled=False):
            for part in chunks:
                states = hidden[part].detach().to(dtype)
                logits = head.transform(head.project(states, vocab_size))
                capped = None if head.softcap is None else logits.clone()
                loss, scores, gradient = loss_of_chunk(part, logits)
                of_logits, scale = cast_gradient(head.transform_gradient(gradient, capped), dtype)
                add_gradients(gradients, of_logits, states, head, part, scale)
                losses.append(loss.detach())
                scored.append(TokenScores._make(None if value is None else value.detach() for value in scores))
        ctx.names, ctx.dtypes = list(inputs), {name: inputs[name].dtype for name in gradients}
        # Not `save_for_backward`: `backward` scales the gradients in place, which saves a copy of (V, H)
        ctx.gradients = gradients
        values = _concatenate(scored)[:4]
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        return torch.stack(losses).sum(), *values

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        if ctx.gradients is None:
            raise RuntimeError("The gradient of a loss through the head can be taken only once. Score again.")
        found = {name: total.mul_(grad_loss).to(ctx.dtypes[name]) for name, total in ctx.gradients.items()}
        ctx.gradients = None
        return *(found.get(name) for name in ctx.names), None, None, None, None


def add_scoring(model: PreTrainedModel, vocab_size: int, teacher_head: TeacherHead | None = None) -> None:
    """Patch a model so that `model(score_requests=[...])` returns a list of scores instead of logits.

    A request is a [`ScoreRequest`], or an object with the same tokens and mask and a method `score`.

    Several requests share one forward call, since wrappers that synchronise gradients (DDP, FSDP, DeepSpeed) expect
    one call per backward pass. Without `score_requests` the forward is unchanged. Patch the model before it is
    wrapped: the wrapper's forward synchronises gradients and gathers sharded weights. Scores are computed inside the
    call of the head's module, because its weights are gathered only there. A deep copy of the model scores with its
    own weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): the causal language model to patch.
        vocab_size (`int`): number of leading vocabulary rows shared with the teacher.
        teacher_head ([`TeacherHead`], *optional*): projects `teacher_hidden_states` to the teacher's logits.
    """
    head, config = model.get_output_embeddings(), model.config

    def forward(self, replaced, *args, score_requests: Sequence[ScoreRequest] | None = None, **kwargs):
        if score_requests is None:
            return replaced(*args, **kwargs)
        scores = []
        for request in score_requests:
            length = request.completion_mask.shape[1]
            hidden_states = completion_hidden_states(self, request.input_ids, request.attention_mask, length)
            scores.append(self.get_output_embeddings()(hidden_states, score_request=request))
        return scores

    def project_or_score(self, replaced, hidden_states, *args, score_request: ScoreRequest | None = None, **kwargs):
        if score_request is None:
            return replaced(hidden_states, *args, **kwargs)
        own_head = LMHead.of_projection(self, config)
        return score_request.score(hidden_states, own_head, vocab_size, teacher_head)

    override_forward(model, forward)
    override_forward(head, project_or_score)
