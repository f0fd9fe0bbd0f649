"""How tokens are cut into chunks of the head, and that a chunk computes only the gradients that are wanted."""

import pytest
import torch

import minillm_trl.models.fused_head as fused_head
from minillm_trl.divergences import reverse_kl
from minillm_trl.models.fused_head import ScoreRequest, chunk_elements, score_hidden_states, token_chunks
from minillm_trl.models.lm_head import LMHead
from minillm_trl.models.packed_weights import packed_weights
from minillm_trl.models.token_scores import TokenScores

IDS = torch.randint(45, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 6, dtype=torch.bool)


def logps(scores: TokenScores, tokens: torch.Tensor) -> torch.Tensor:
    return scores.logps


def random_head(dtype: torch.dtype = torch.float32, trained: bool = True) -> tuple[torch.Tensor, LMHead]:
    """Hidden states of the tokens, and a head with a bias."""
    draws = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape, generator=draws).to(dtype) for shape in ((2, 6, 8), (50, 8), (50,)))
    return hidden.requires_grad_(), LMHead(weight.requires_grad_(trained), bias.requires_grad_(trained))


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "gradient", "expected"),
    [
        (0, 10, 0, [(0, 2)]),
        (1, 10, 0, [(0, 2)]),
        (5, 10, 0, [(0, 2), (2, 4), (4, 6)]),
        (4, 10, 0, [(0, 2), (2, 4)]),
        (2, 21, 0, [(0, 1), (1, 2)]),
        (0, 21, 0, [(0, 1)]),
        (2, 99, 0, [(0, 1), (1, 2)]),  # at least a token a chunk
        (5, 10, 123, [(0, 3), (3, 6)]),  # a fourth of the gradient
        (5, 10, 83, [(0, 2), (2, 4), (4, 6)]),
    ],
)
def test_chunks_have_as_many_tokens_as_fit(monkeypatch, tokens: int, vocabulary: int, gradient: int, expected: list):
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 20)
    found = token_chunks(tokens, vocabulary, gradient)
    assert [(part.start, part.stop) for part in found] == expected
    assert chunk_elements(gradient) == max(20, gradient // 4)


@pytest.mark.parametrize("trained", [True, False])
def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch, trained: bool):
    """That of a large head takes gigabytes."""
    computed = []
    add = fused_head.add_gradients
    monkeypatch.setattr(
        fused_head, "add_gradients", lambda totals, *rest: computed.append(set(totals)) or add(totals, *rest)
    )
    hidden, head = random_head(trained=trained)
    request = ScoreRequest(IDS, MASK, MASK, loss=logps)
    expected = score_hidden_states(hidden, head, request._replace(loss=None), 50).logps.sum()
    scores = score_hidden_states(hidden, head, request, 50)
    assert computed == [{"hidden", "weight", "bias"} if trained else {"hidden"}]
    torch.testing.assert_close(scores.loss, expected)
    computed.clear()
    with torch.no_grad():
        evaluated = score_hidden_states(hidden, head, request, 50)
    assert not computed
    torch.testing.assert_close(evaluated.loss, expected)
    assert not evaluated.loss.requires_grad


def test_loss_that_needs_no_gradient_has_none():
    hidden, head = random_head(trained=False)
    scores = score_hidden_states(hidden.detach(), head, ScoreRequest(IDS, MASK, MASK, loss=logps), 50)
    assert not scores.loss.requires_grad
    torch.testing.assert_close(scores.loss, scores.logps.sum())


def test_gradients_in_half_precision_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Of a head in bfloat16, in chunks of a token, whose contributions have the same sign."""
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 1)
    ids = torch.zeros(1, 600, dtype=torch.long)
    mask = torch.ones(1, 600, dtype=torch.bool)
    draws = torch.Generator().manual_seed(0)
    hidden = (1.0 + 0.1 * torch.randn(1, 600, 4, generator=draws)).bfloat16()
    weight, bias = (0.1 * torch.randn(3, 4, generator=draws)).bfloat16(), torch.zeros(3).bfloat16()

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [each.to(dtype).requires_grad_() for each in (weight, bias)]
        request = ScoreRequest(ids, mask, mask, loss=logps)
        return torch.autograd.grad(score_hidden_states(hidden.to(dtype), LMHead(*inputs), request, 3).loss, inputs)

    for found, expected in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < 0.006 * expected.norm()


def test_teachers_states_without_its_head_are_refused():
    hidden, head = random_head()
    request = ScoreRequest(IDS, MASK, MASK, teacher_hidden_states=hidden.detach())
    for loss in (None, logps):
        with pytest.raises(ValueError, match="teacher_hidden_states need a teacher_head"):
            score_hidden_states(hidden, head, request._replace(loss=loss), 50)


def test_packed_head_has_the_gradients_of_its_weight():
    """Of fewer rows of the vocabulary than are packed."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 300)
    hidden = torch.randn(2, 6, 256, requires_grad=True)
    request = ScoreRequest(IDS, MASK, MASK, loss=logps)

    def gradients() -> tuple[torch.Tensor, ...]:
        head = LMHead(model.weight, model.bias, packed=getattr(model, "packed_weight", None))
        loss = score_hidden_states(hidden, head, request, 290).loss
        return torch.autograd.grad(loss, [hidden, model.weight, model.bias])

    expected = gradients()
    with packed_weights([model], tokens=16):
        found = gradients()
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kd_temperature", [None, 2.0])
def test_gradients_of_terms_and_halves_are_those_of_a_bias_on_the_logits(monkeypatch, kd_temperature: float | None):
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 150)  # three tokens a chunk
    hidden, head = random_head(torch.float64)
    teacher_hidden, teacher_head = random_head(torch.float64)
    mask = torch.tensor([[True, False, True, True, True, False], [True] * 4 + [False] * 2])
    half = torch.tensor([1, 0])

    def loss(scores: TokenScores, tokens: torch.Tensor) -> torch.Tensor:
        return (1 + tokens) * scores.logps * scores.divergence

    request = ScoreRequest(IDS, mask, mask, 0.7, 1.5 * teacher_hidden.detach(), kd_temperature, loss=loss, half=half)
    found = score_hidden_states(hidden, head, request, 45, teacher_head).term_gradients
    for of_half in range(2):
        for path, name in enumerate(("divergence", "logps")):  # each is constant on the other's path
            bias = head.bias.detach().clone().requires_grad_()
            rows = mask & (half == of_half)[:, None]
            plain = request._replace(completion_mask=rows, loss=None)
            scores = score_hidden_states(hidden, LMHead(head.weight, bias), plain, 45, teacher_head)
            scores = scores._replace(**{name: getattr(scores, name).detach()})
            total = loss(scores, torch.arange(12).view(2, 6)).sum()
            (expected,) = torch.autograd.grad(total, bias)
            torch.testing.assert_close(found[path, of_half].double(), expected[:45], rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 2, 45)
    assert not found.requires_grad


def test_scores_are_at_temperature_one_and_of_the_divergence_alone_by_default():
    hidden, head = random_head()
    request = ScoreRequest(IDS, MASK, MASK, teacher_hidden_states=2.0 * hidden.detach())
    scores = score_hidden_states(hidden, head, request, 50, head)
    q, p = (torch.log_softmax(head.logits(states, 50), -1).detach() for states in (hidden, 2.0 * hidden))
    torch.testing.assert_close(scores.logps.detach(), q.gather(2, IDS[..., None])[..., 0])
    torch.testing.assert_close(scores.divergence.detach(), reverse_kl(q, p))
    assert scores.reverse_kl is scores.loss is scores.term_gradients is None
