"""Log-probs, entropy and full-vocabulary divergences from hidden states, a chunk of tokens at a time.

The logits of a whole batch, (B, T, V) for student and teacher, never exist: each chunk of tokens is projected through
the LM heads and reduced to a few numbers a token. Where the loss of a token is known from these numbers, its gradient
is formed at once, while the chunk's logits are there, so nothing is projected again in the backward pass. Only real
completion tokens are scored. `add_scoring` puts the computation inside the model's own forward, so that DDP, FSDP,
DeepSpeed, PEFT and autocast treat it like any other forward pass.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..objectives import forward_kl, reverse_kl
from .forward_methods import override_forward
from .lm_head import LMHead, completion_hidden_states

# Elements of one chunk's logits. Peak memory is a small multiple of this, whatever B, T and V are. In float32 it is
# more than the 32 MiB from which glibc maps a block of its own: smaller ones come from a heap that fragments to
# gigabytes.
CHUNK_ELEMENTS = 2**24

# float16 holds numbers below 2^16; the largest entry of a chunk's gradient is brought to just below this power of two.
_FLOAT16_EXPONENT = 15


class TokenScores(NamedTuple):
    """Per-token values of shape `(B, T)` (in a request's loss `(n,)`), nats; 0 outside the mask.

    Attributes:
        logps (`torch.Tensor`): log-probs of the tokens.
        entropy (`torch.Tensor`): of the next-token distribution; detached.
        divergence (`torch.Tensor`, *optional*): from the teacher; None unless its hidden states were given.
        loss (`torch.Tensor`, *optional*): scalar, the sum of the request's loss over the scored tokens, if it has one.
            It then carries the gradient, and the other values are detached.
        term_gradients (`torch.Tensor` of shape `(2, 2, V)`, *optional*): the gradient of that sum with respect to a
            bias on the logits, by way of the log-probs and of the divergence, over the tokens of either half of the
            completions. None unless the request says which half each is in.
    """

    logps: torch.Tensor
    entropy: torch.Tensor
    divergence: torch.Tensor | None
    loss: torch.Tensor | None = None
    term_gradients: torch.Tensor | None = None


class ScoreRequest(NamedTuple):
    """Sequences to score; their last T columns are the completion.

    Attributes:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P+T)`): left-padded prompts, right-padded completions.
        completion_mask (`torch.Tensor` of shape `(B, T)`): True on the tokens to score.
        temperature (`float`): temperature of `logps` and `entropy`.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H_teacher)`, *optional*): the teacher's last hidden
            states at the positions that predict the completion's tokens.
        kd_temperature (`float`, *optional*): temperature of `divergence`; None means `temperature`.
        divergence (`Callable`): [`~minillm_trl.objectives.reverse_kl`] or
            [`~minillm_trl.objectives.forward_kl`] of student and teacher.
        loss (`Callable`, *optional*): maps the [`TokenScores`] `(n,)` of some tokens and their numbers `(n,)` among
            the B * T to their losses `(n,)`. Each loss depends on the scores of its token alone.
        half (`torch.Tensor` of shape `(B,)`, *optional*): 0 or 1, for `term_gradients` of a loss of log-probs and
            divergence; needs `teacher_hidden_states`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    temperature: float = 1.0
    teacher_hidden_states: torch.Tensor | None = None
    kd_temperature: float | None = None
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = reverse_kl
    loss: "Callable[[TokenScores, torch.Tensor], torch.Tensor] | None" = None
    half: torch.Tensor | None = None

    @property
    def completion_ids(self) -> torch.Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def score(
        self, hidden_states: torch.Tensor, head: LMHead, vocab_size: int, teacher_head: LMHead | None
    ) -> TokenScores:
        """Score from the hidden states `(B, T, H)` of the model that runs, see [`score_hidden_states`]."""
        return score_hidden_states(hidden_states, head, self, vocab_size, teacher_head)


def score_hidden_states(
    hidden_states: torch.Tensor,
    head: LMHead,
    request: ScoreRequest,
    vocab_size: int,
    teacher_head: LMHead | None = None,
) -> TokenScores:
    r"""Score the tokens of completions from the hidden states that predict them.

    With logits z = head(h): `logps` = log softmax(z / temperature)[y_t], `entropy` of the same distribution, and
    `divergence` that of softmax(z / kd_temperature) and softmax(teacher_head(h_teacher) / kd_temperature).

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, H)`): carries the gradient, as do the head's tensors.
        head ([`LMHead`]): the student's head.
        request ([`ScoreRequest`]): tokens, mask, temperatures and the teacher's hidden states.
        vocab_size (`int`): number of leading vocabulary rows that both models share; others are excluded from both.
        teacher_head ([`LMHead`], *optional*): required with `request.teacher_hidden_states`. Receives no gradient.

    Returns:
        [`TokenScores`]. Memory beyond the inputs is bounded by `CHUNK_ELEMENTS`, not by B * T * V.
    """
    rows = request.completion_mask.flatten().nonzero().squeeze(1)  # (N,)
    hidden = hidden_states.flatten(0, 1)[rows]
    targets = request.completion_ids.flatten()[rows]
    teacher_hidden = request.teacher_hidden_states
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.flatten(0, 1)[rows]
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    # an empty batch makes one empty chunk: zeros with a graph
    chunks = [slice(start, start + size) for start in range(0, max(len(rows), 1), size)]

    def teacher_logits(part: slice) -> torch.Tensor | None:
        return None if teacher_hidden is None else teacher_head.logits(teacher_hidden[part], vocab_size)

    def score_chunk(hidden: torch.Tensor, part: slice) -> TokenScores:
        with torch.no_grad():
            teacher = teacher_logits(part)
        return _score_logits(head.logits(hidden, vocab_size), targets[part], teacher, request)

    loss = term_gradients = None
    if request.loss is not None and torch.is_grad_enabled():
        membership = None
        if request.half is not None:
            half = request.half[rows // request.completion_mask.shape[1]]
            membership = torch.stack([half == 0, half == 1])  # (2, N)
            term_gradients = torch.zeros(2, 2, vocab_size, device=rows.device)

        def loss_of_chunk(part: slice, logits: torch.Tensor) -> tuple[torch.Tensor, TokenScores, torch.Tensor]:
            scores, gradient = _score_logits_in_place(logits, targets[part], teacher_logits(part), request)
            with torch.enable_grad():
                inputs = [each.requires_grad_() for each in (scores.logps, scores.divergence) if each is not None]
                loss = request.loss(scores, rows[part]).sum()
                found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            if membership is None:
                return loss, scores, gradient(*found)
            return loss, scores, gradient(*found, membership[:, part], term_gradients)

        loss, *values = _LossThroughHead.apply(hidden, head.weight, head.bias, head, vocab_size, chunks, loss_of_chunk)
        pieces = [tuple(values)]
    elif torch.is_grad_enabled():
        pieces = [checkpoint(score_chunk, hidden[part], part, use_reentrant=False)[:3] for part in chunks]
    else:
        pieces = [score_chunk(hidden[part], part)[:3] for part in chunks]

    def scatter(flat: torch.Tensor) -> torch.Tensor:
        full = flat.new_zeros(request.completion_mask.numel()).index_put((rows,), flat)
        return full.view_as(request.completion_mask)

    logps, entropy, divergence = (None if each[0] is None else torch.cat(each) for each in zip(*pieces, strict=True))
    if request.loss is not None and loss is None:
        loss = request.loss(TokenScores(logps, entropy, divergence), rows).sum()
    divergence = None if divergence is None else scatter(divergence)
    return TokenScores(scatter(logps), scatter(entropy), divergence, loss, term_gradients)


class _LossThroughHead(torch.autograd.Function):
    """Sum of a loss over chunks of tokens, whose gradient is formed chunk by chunk in the forward pass.

    Kept for the backward pass are the gradients of hidden states (N, H) and head (V, H), in float32 at least. Under
    autocast the products are in its dtype and everything between them in float32. These gradients are formed before
    the loss scale of float16 training is applied, so each chunk brings its own scale to float16.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, vocab_size, chunks, loss_of_chunk):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        head = dataclasses.replace(
            head,
            weight=weight.detach()[:vocab_size].to(dtype),
            bias=None if bias is None else bias.detach()[:vocab_size].to(dtype),
        )
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
        gradients = {
            name: torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
            for name, each in inputs.items()
            if each is not None and each.requires_grad
        }
        losses, pieces = [], []
        with torch.autocast(device, enabled=False):
            for part in chunks:
                states = hidden[part].detach().to(dtype)
                logits = head.transform(head.project(states, vocab_size))
                capped = None if head.softcap is None else logits.clone()
                loss, scores, gradient = loss_of_chunk(part, logits)
                of_logits, scale = _cast_gradient(head.transform_gradient(gradient, capped), dtype)
                _add_gradients(gradients, of_logits, states, head, part, scale)
                losses.append(loss.detach())
                pieces.append([None if each is None else each.detach() for each in scores[:3]])
        ctx.names, ctx.dtypes = list(inputs), {name: inputs[name].dtype for name in gradients}
        ctx.gradients = gradients  # not `save_for_backward`: they are scaled in place, which saves a copy of (V, H)
        values = [None if each[0] is None else torch.cat(each) for each in zip(*pieces, strict=True)]
        ctx.mark_non_differentiable(*(each for each in values if each is not None))
        return torch.stack(losses).sum(), *values

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        if ctx.gradients is None:
            raise RuntimeError("The gradient of a loss through the head can be taken once; score again for another.")
        found = {name: each.mul_(grad_loss).to(ctx.dtypes[name]) for name, each in ctx.gradients.items()}
        ctx.gradients = None
        return *(found.get(name) for name in ctx.names), None, None, None, None


def _cast_gradient(gradient: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of a chunk's logits `(n, V)` in `dtype`, multiplied by a power of two for float16, and that power.

    A weight or an advantage of a thousand is more than float16 holds beside the gradients of tokens with a small
    probability, so the largest entry decides the scale. bfloat16 has the range of float32 and needs none.
    """
    if dtype != torch.float16:
        return gradient.to(dtype), None
    largest = torch.linalg.vector_norm(gradient, ord=torch.inf)
    exponent = (_FLOAT16_EXPONENT - torch.frexp(largest).exponent).clamp(max=100)  # 2^100: of gradients that are 0
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return gradient.mul_(scale).to(dtype), scale


def _add_gradients(
    gradients: dict[str, torch.Tensor],
    of_logits: torch.Tensor,
    states: torch.Tensor,
    head: LMHead,
    part: slice,
    scale: torch.Tensor | None,
) -> None:
    """Add what a chunk's gradient `(n, V)`, which was multiplied by `scale`, gives hidden states `(n, H)` and head."""

    def add(total: torch.Tensor, scaled: torch.Tensor) -> None:
        total += scaled if scale is None else scaled / scale

    if "hidden" in gradients:
        add(gradients["hidden"][part], _product(of_logits, head.weight))
    if "weight" in gradients:  # in blocks of rows, so that no second (V, H) exists
        size, width = head.weight.shape
        rows = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, size, rows):
            block = slice(start, min(start + rows, size))
            add(gradients["weight"][block], _product(of_logits[:, block].T, states))
    if "bias" in gradients:
        add(gradients["bias"][: of_logits.shape[1]], of_logits.sum(dim=0, dtype=gradients["bias"].dtype))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, on GPUs and for float16 in float32 at least: float16 may not hold sums over a chunk's tokens."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


def _score_logits(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None, request: ScoreRequest
) -> TokenScores:
    log_probs = torch.log_softmax(logits / request.temperature, dim=-1)
    logps = log_probs.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    if teacher_logits is None:
        return TokenScores(logps, entropy, None)
    kd_temperature = request.kd_temperature or request.temperature
    if kd_temperature != request.temperature:
        log_probs = torch.log_softmax(logits / kd_temperature, dim=-1)
    teacher_log_probs = torch.log_softmax(teacher_logits / kd_temperature, dim=-1)
    return TokenScores(logps, entropy, request.divergence(log_probs, teacher_log_probs))


def _score_logits_in_place(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None, request: ScoreRequest
) -> tuple[TokenScores, Callable[..., torch.Tensor]]:
    r"""[`_score_logits`] without a graph, and a function from the gradients of log-probs and divergence to the logits.

    $$ \partial \log q(y) / \partial z_v = 1_{v=y} - q_v, \qquad
       \partial \mathrm{KL}(q \| p) / \partial z_v = q_v (\log q_v - \log p_v - \mathrm{KL}), \qquad
       \partial \mathrm{KL}(p \| q) / \partial z_v = q_v - p_v $$

    Everything happens in the memory of the logits of both models, which are overwritten, and of one more tensor of
    their size (more with two temperatures): fresh memory is cleared by the system first.
    """
    temperature, kd_temperature = request.temperature, request.kd_temperature or request.temperature
    kd_log_probs = None
    if teacher_logits is not None and kd_temperature != temperature:
        kd_log_probs = torch.log_softmax(logits / kd_temperature, dim=-1)
    log_probs = _log_softmax_(logits, temperature)
    logps = log_probs.gather(1, targets[:, None]).squeeze(1)
    probs = log_probs.exp()
    divergence = of_divergence = None
    if teacher_logits is not None:
        kd_log_probs = log_probs if kd_log_probs is None else kd_log_probs
        kd_probs = probs if kd_log_probs is log_probs else kd_log_probs.exp()
        teacher_log_probs = _log_softmax_(teacher_logits, kd_temperature)
        if request.divergence is reverse_kl:
            of_divergence = teacher_log_probs.neg_().add_(kd_log_probs).mul_(kd_probs)
            divergence = of_divergence.sum(dim=-1)
            of_divergence.addcmul_(kd_probs, divergence[:, None], value=-1.0)
        elif request.divergence is forward_kl:
            teacher_probs = teacher_log_probs.exp()
            divergence = teacher_log_probs.sub_(kd_log_probs).mul_(teacher_probs).sum(dim=-1)
            of_divergence = teacher_probs.neg_().add_(kd_probs)
        else:
            raise ValueError(f"divergence must be reverse_kl or forward_kl with a loss, got {request.divergence!r}.")

    entropy = -log_probs.mul_(probs).sum(dim=-1)

    def gradient(
        of_logps: torch.Tensor,
        of_divergences: torch.Tensor | None = None,
        membership: torch.Tensor | None = None,
        term_gradients: torch.Tensor | None = None,
    ) -> torch.Tensor:
        of_logps = of_logps[:, None] / temperature
        total = probs.mul_(-of_logps).scatter_add_(1, targets[:, None], of_logps)
        if membership is not None:
            membership = membership.to(total.dtype)
            term_gradients[0] += membership @ total
            term_gradients[1] += (membership * (of_divergences / kd_temperature)) @ of_divergence
        if of_divergence is not None:
            total.addcmul_(of_divergence, of_divergences[:, None] / kd_temperature)
        return total

    return TokenScores(logps, entropy, divergence), gradient


def _log_softmax_(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    if temperature != 1.0:
        logits.div_(temperature)
    # the CPU's kernel may write where it reads; fresh memory is cheap on GPUs
    return torch.log_softmax(logits, dim=-1, out=logits if logits.device.type == "cpu" else None)


def add_scoring(model: PreTrainedModel, vocab_size: int, teacher_head: LMHead | None = None) -> None:
    """Let `model(score_requests=[...])` return a list of scores instead of logits.

    A request is a [`ScoreRequest`], or another that has its tokens and mask and a method `score`.

    Several requests are one forward call, as wrappers that synchronise gradients (DDP, FSDP, DeepSpeed) want one call
    for one backward pass. Without `score_requests` the forward is the one it was. Patch before the model is wrapped,
    as the wrapper's forward is what synchronises gradients and gathers sharded weights. For the same reason the scores
    are computed inside the call of the head's own module: that is when its weights are whole. A deep copy of the model
    scores with its own weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): the causal language model to patch.
        vocab_size (`int`): number of leading vocabulary rows shared with the teacher.
        teacher_head ([`LMHead`], *optional*): turns `teacher_hidden_states` into the teacher's distribution.
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
