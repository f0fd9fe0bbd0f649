"""The chunked scoring head against the plain formulas, values and gradients."""

import copy
import dataclasses
import inspect

import pytest
import torch
from conftest import FAMILIES, build_model
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

import minillm_trl.models.fused_head
from minillm_trl.divergences import DIVERGENCES, choose_divergence, forward_kl, reverse_kl
from minillm_trl.models.divergence_gradients import divergence_of
from minillm_trl.models.fused_head import ScoreRequest, add_scoring, score_hidden_states
from minillm_trl.models.lm_head import LMHead, check_head, completion_hidden_states, position_ids
from minillm_trl.models.token_scores import TokenScores, score_logits_in_place
from minillm_trl.rollouts.decoding import check_decoding


def make_head(width: int, vocab: int, bias: bool, softcap: float | None, scale: float = 1.0) -> LMHead:
    weight = torch.randn(vocab, width, dtype=torch.float64, requires_grad=True)
    return LMHead(
        weight, torch.randn(vocab, dtype=torch.float64, requires_grad=True) if bias else None, scale, softcap
    )


@pytest.mark.parametrize("chunk_elements", [1, 60, 2**23], ids=["a token a chunk", "odd chunks", "one chunk"])
@pytest.mark.parametrize(
    ("bias", "softcap", "scale", "kd_temperature", "divergence"),
    [
        (False, None, 1.0, None, reverse_kl),
        (True, 5.0, 0.5, None, reverse_kl),
        (True, None, 1.0, 2.5, reverse_kl),
        (True, 5.0, 1.0, None, forward_kl),
    ],
)
def test_values_and_gradients_equal_the_plain_formulas(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, bias: bool, softcap, scale: float, kd_temperature, divergence
):
    torch.manual_seed(0)
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", chunk_elements)
    rows, length, vocab, shared, temperature = 3, 7, 31, 29, 1.3
    head, teacher_head = make_head(5, vocab, bias, softcap, scale), make_head(9, shared, bias, softcap, scale)
    hidden = torch.randn(rows, length, 5, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(rows, length, 9, dtype=torch.float64)
    ids = torch.randint(shared, (rows, length))
    mask = torch.rand(rows, length) < 0.7
    request = ScoreRequest(ids, mask, mask, temperature, teacher_hidden, kd_temperature, divergence)
    scores = score_hidden_states(hidden, head, request, shared, teacher_head)

    logits = scale * (hidden @ head.weight[:shared].T + (head.bias[:shared] if bias else 0.0))
    teacher_logits = scale * (teacher_hidden @ teacher_head.weight.T + (teacher_head.bias if bias else 0.0))
    if softcap:
        logits, teacher_logits = (softcap * torch.tanh(raw / softcap) for raw in (logits, teacher_logits))
    log_probs = torch.log_softmax(logits / temperature, -1)
    kd = kd_temperature or temperature
    kl = divergence(torch.log_softmax(logits / kd, -1), torch.log_softmax(teacher_logits / kd, -1))
    expected = {
        "logps": log_probs.gather(2, ids[..., None]).squeeze(2),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "divergence": kl,
    }
    weights = {name: torch.randn(rows, length, dtype=torch.float64) for name in ("logps", "divergence")}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(scores, name), value.masked_fill(~mask, 0.0))
    inputs = [hidden, head.weight, *([head.bias] if bias else [])]
    actual_total = sum((weights[name] * getattr(scores, name)).sum() for name in weights)
    expected_total = sum((weights[name] * expected[name])[mask].sum() for name in weights)
    actual, reference = torch.autograd.grad(actual_total, inputs), torch.autograd.grad(expected_total, inputs)
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not scores.entropy.requires_grad
    assert not teacher_head.weight.grad


@pytest.mark.parametrize("chunk_elements", [1, 60, 2**23], ids=["a token a chunk", "odd chunks", "one chunk"])
@pytest.mark.parametrize("kd_temperature", [None, 2.5])
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradient_formed_in_the_forward_pass_is_that_of_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, kd_temperature, divergence, softcap, frozen_head: bool
):
    torch.manual_seed(0)
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", chunk_elements)
    rows, length, vocab, shared = 3, 7, 31, 29
    head, teacher_head = make_head(5, vocab, True, softcap, 0.5), make_head(9, vocab, False, None)
    head.weight.requires_grad_(not frozen_head)
    hidden = torch.randn(rows, length, 5, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(rows, length, 9, dtype=torch.float64)
    ids, mask = torch.randint(shared, (rows, length)), torch.rand(rows, length) < 0.7
    coefficients = torch.randn(2, rows * length, dtype=torch.float64)

    def loss(scores, numbers):
        a, b = coefficients[:, numbers]
        return a * scores.logps.exp() + b * scores.logps * scores.divergence

    request = ScoreRequest(ids, mask, mask, 1.3, teacher_hidden, kd_temperature, divergence)
    inputs = [tensor for tensor in (hidden, head.weight, head.bias) if tensor.requires_grad]
    plain = score_hidden_states(hidden, head, request, shared, teacher_head)
    expected = loss(
        plain._replace(logps=plain.logps[mask], divergence=plain.divergence[mask]), mask.flatten().nonzero().squeeze(1)
    ).sum()
    scores = score_hidden_states(hidden, head, request._replace(loss=loss), shared, teacher_head)
    torch.testing.assert_close(scores.loss, expected)
    assert scores.loss.requires_grad
    for name in ("logps", "entropy", "divergence"):
        torch.testing.assert_close(getattr(scores, name), getattr(plain, name).detach())
        assert not getattr(scores, name).requires_grad
    actual, reference = torch.autograd.grad(3.0 * scores.loss, inputs), torch.autograd.grad(3.0 * expected, inputs)
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


PARAMETERS = {"forward_kl_share": 0.3, "jsd_beta": 0.2, "skew_alpha": 0.15, "teacher_entropy_threshold": 1.7}
ALL_DIVERGENCES = [
    *(pytest.param(choose_divergence(name, **PARAMETERS), id=name) for name in DIVERGENCES),
    pytest.param(choose_divergence("generalized_jsd", jsd_beta=0.0), id="jsd 0"),
    pytest.param(choose_divergence("generalized_jsd", jsd_beta=1.0), id="jsd 1"),
    pytest.param(choose_divergence("skewed_forward_kl", skew_alpha=0.0), id="skewed forward 0"),
    pytest.param(choose_divergence("skewed_reverse_kl", skew_alpha=0.0), id="skewed reverse 0"),
]


@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
@pytest.mark.parametrize("kd_temperature", [None, 2.5])
def test_each_divergence_has_autograds_gradient_and_measures_the_reverse_kl(
    monkeypatch: pytest.MonkeyPatch, divergence, kd_temperature
):
    """With other teacher rows of the vocabulary, a soft cap, a scale, and odd chunks."""
    torch.manual_seed(0)
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", 60)
    rows, length, shared, temperature = 3, 7, 29, 1.3
    head, teacher_head = make_head(5, 31, True, 4.0, 0.5), make_head(9, 33, False, None)
    hidden = torch.randn(rows, length, 5, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(rows, length, 9, dtype=torch.float64)
    ids, mask = torch.randint(shared, (rows, length)), torch.rand(rows, length) < 0.7
    weights = torch.randn(rows * length, dtype=torch.float64)
    request = ScoreRequest(
        ids, mask, mask, temperature, teacher_hidden, kd_temperature, divergence, measure_reverse_kl=True
    )
    inputs = [hidden, head.weight, head.bias]
    q, p = (
        torch.log_softmax(model.logits(states, shared) / (kd_temperature or temperature), -1)
        for model, states in ((head, hidden[mask]), (teacher_head, teacher_hidden[mask]))
    )
    expected = divergence_of(divergence, q, p, ids[mask])
    gradients = torch.autograd.grad((weights[mask.flatten()] * expected).sum(), inputs, retain_graph=True)
    assert gradients[0].abs().max() > 1e-3

    plain = score_hidden_states(hidden, head, request, shared, teacher_head)
    lossy = score_hidden_states(
        hidden, head, request._replace(loss=lambda s, at: weights[at] * s.divergence), shared, teacher_head
    )
    for scores in (plain, lossy):
        torch.testing.assert_close(scores.divergence[mask], expected)
        torch.testing.assert_close(scores.reverse_kl[mask], reverse_kl(q, p).detach())
        assert not scores.reverse_kl.requires_grad
    total = (weights.view(rows, length) * plain.divergence).sum()
    for loss in (total, lossy.loss):
        for actual, reference in zip(torch.autograd.grad(loss, inputs), gradients, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_each_divergence_survive_half_precision(dtype: torch.dtype, divergence):
    torch.manual_seed(0)
    weight, teacher_weight = (0.3 * torch.randn(40, 16)).requires_grad_(), 0.3 * torch.randn(40, 16)
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    ids = torch.randint(40, (2, 6))
    request = ScoreRequest(ids, ids, torch.ones_like(ids, dtype=torch.bool), 1.0, hidden.detach(), None, divergence)

    def gradients(half: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype=dtype, enabled=half):
            scores = score_hidden_states(
                hidden,
                LMHead(weight, None),
                request._replace(loss=lambda scores, _: 1e-6 * scores.divergence),
                40,
                LMHead(teacher_weight, None),
            )
        return torch.autograd.grad(scores.loss, [hidden, weight])

    for actual, reference in zip(gradients(True), gradients(False), strict=True):
        assert (actual - reference).norm() < 0.02 * reference.norm()


def test_another_divergence_has_no_gradient_in_closed_form():
    head, hidden = make_head(4, 6, False, None), torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 3]])
    request = ScoreRequest(ids, ids, ids.bool(), 1.0, hidden.detach(), None, lambda student, teacher: student.sum(-1))
    with pytest.raises(ValueError, match="divergence must be a function of minillm_trl"):
        score_hidden_states(hidden, head, request._replace(loss=lambda scores, _: scores.divergence), 6, head)


def test_gradient_of_the_log_probs_alone_is_that_without_a_teacher():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 9, dtype=torch.float64).unbind()
    targets, coefficients = torch.randint(9, (5,)), torch.randn(5, dtype=torch.float64)

    def gradient(teacher_logits: torch.Tensor | None) -> torch.Tensor:
        scored = score_logits_in_place(logits.clone(), targets, teacher_logits, 0.7, 2.0, reverse_kl)
        return scored[1](coefficients)

    assert torch.equal(gradient(teacher), gradient(None))


def test_head_is_projected_once_for_a_loss(monkeypatch: pytest.MonkeyPatch):
    projections = []
    project = LMHead.project
    monkeypatch.setattr(
        LMHead, "project", lambda self, hidden, size: projections.append(len(hidden)) or project(self, hidden, size)
    )
    head, hidden = make_head(4, 6, False, None), torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 3]])
    request = ScoreRequest(ids, ids, ids.bool())
    score_hidden_states(hidden, head, request._replace(loss=lambda scores, _: scores.logps), 6).loss.backward()
    assert projections == [3]
    score_hidden_states(hidden, head, request, 6).logps.sum().backward()
    assert projections == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_half_precision(dtype: torch.dtype):
    torch.manual_seed(0)
    weight = (0.3 * torch.randn(40, 16)).requires_grad_()
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    ids = torch.randint(40, (2, 6))
    request = ScoreRequest(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    scale = 1e-6  # of a loss over a million tokens

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, [hidden, weight])

    expected = gradients(scale * score_hidden_states(hidden, LMHead(weight, None), request, 40).logps.sum())
    with torch.autocast("cpu", dtype=dtype):
        halved = request._replace(loss=lambda scores, _: scores.logps)
        scores = score_hidden_states(hidden, LMHead(weight, None), halved, 40)
    assert scores.loss.dtype == torch.float32
    for actual, reference in zip(gradients(scale * scores.loss), expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("coefficient", [1e-9, 1.0, 1100.0, 3e5, 1e30])
def test_gradients_of_losses_of_any_size_survive_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, coefficient: float
):
    """float16 holds 6e-8 to 65504, and a loss scale comes after the gradient of the head."""
    torch.manual_seed(0)
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", 160)  # four tokens a chunk
    weight, bias = (0.3 * torch.randn(40, 16)).requires_grad_(), torch.randn(40, requires_grad=True)
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    ids = torch.randint(40, (2, 6))
    request = ScoreRequest(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    # chunks whose sizes differ by far more than float16 can hold
    coefficients = coefficient * torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-6, 1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0, 1.0])

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss / coefficient, [hidden, weight, bias])

    plain = score_hidden_states(hidden, LMHead(weight, bias), request, 40)
    expected = gradients((coefficients * plain.logps.flatten()).sum())
    with torch.autocast("cpu", dtype=dtype):
        halved = request._replace(loss=lambda scores, rows: coefficients[rows] * scores.logps)
        found = gradients(score_hidden_states(hidden, LMHead(weight, bias), halved, 40).loss)
    for actual, reference in zip(found, expected, strict=True):
        assert (actual - reference).norm() < 0.02 * reference.norm()
    middle, reference = (gradients[0].flatten(0, 1)[4:8] for gradients in (found, expected))
    assert (middle - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_that_is_not_finite_stays_so(dtype: torch.dtype):
    weight, hidden = torch.ones(5, 4, requires_grad=True), torch.ones(1, 3, 4, requires_grad=True)
    ids = torch.zeros(1, 3, dtype=torch.long)
    request = ScoreRequest(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    for value in (torch.nan, torch.inf):
        with torch.autocast("cpu", dtype=dtype):
            halved = request._replace(loss=lambda scores, _, value=value: scores.logps * value)
            loss = score_hidden_states(hidden, LMHead(weight, None), halved, 5).loss
        assert not torch.autograd.grad(loss, weight)[0].isfinite().all()


@pytest.mark.parametrize("with_loss", [False, True])
def test_only_the_products_with_the_heads_are_in_half_precision(with_loss: bool):
    torch.manual_seed(0)
    weight, hidden = torch.randn(300, 8).bfloat16().float(), torch.randn(1, 6, 8).bfloat16().float()
    teacher_weight, ids = torch.randn(300, 8).bfloat16().float(), torch.randint(300, (1, 6))
    request = ScoreRequest(ids, ids, torch.ones(1, 6, dtype=torch.bool), 1.0, hidden)
    if with_loss:
        request = request._replace(loss=lambda scores, _: scores.logps + scores.divergence)
    with torch.autocast("cpu", torch.bfloat16):
        heads = LMHead(weight.requires_grad_(), None), LMHead(teacher_weight.bfloat16(), None)
        scores = score_hidden_states(hidden.requires_grad_(), heads[0], request, 300, heads[1])
    logits, teacher_logits = (
        torch.nn.functional.linear(hidden.detach().bfloat16(), matrix.detach().bfloat16()).float().log_softmax(-1)
        for matrix in (weight, teacher_weight)
    )
    torch.testing.assert_close(scores.entropy, -(logits.exp() * logits).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.divergence, reverse_kl(logits, teacher_logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.logps, logits.gather(2, ids[..., None]).squeeze(2), rtol=1e-5, atol=1e-5)


def test_gradient_can_be_taken_once():
    head, hidden = make_head(4, 6, False, None), torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 3]])
    request = ScoreRequest(ids, ids, ids.bool(), loss=lambda scores, _: scores.logps)
    loss = score_hidden_states(hidden, head, request, 6).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_loss_of_no_tokens_is_zero_and_stays_connected():
    head = make_head(4, 6, False, None)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    request = ScoreRequest(ids, ids, ids.bool(), loss=lambda scores, _: scores.logps)
    scores = score_hidden_states(hidden, head, request, 6)
    assert scores.loss.item() == 0.0
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(scores.loss, [hidden, head.weight]))


def test_batch_without_tokens_scores_zero_and_stays_connected():
    head = make_head(4, 6, False, None)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    scores = score_hidden_states(hidden, head, ScoreRequest(ids, ids, ids.bool()), 6)
    assert scores.logps.abs().sum() == 0
    gradient = torch.autograd.grad(scores.logps.sum(), [hidden, head.weight])
    assert all(part.abs().sum() == 0 for part in gradient)


def test_forward_without_a_request_is_unchanged():
    model = build_model("gpt2", vocab_size=40)
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    add_scoring(model, 40)
    assert torch.equal(model(ids).logits, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=1).shape[0] == 1


def test_deep_copy_scores_with_weights_of_its_own():
    model = build_model("gpt2", vocab_size=40)
    add_scoring(model, 40)
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    request = ScoreRequest(ids, torch.ones_like(ids), mask)

    def outputs(model) -> list[torch.Tensor]:
        return [model(ids).logits, model(score_requests=[request])[0].logps]

    copied = copy.deepcopy(model)
    before = outputs(copied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    for old, new, live in zip(before, outputs(copied), outputs(model), strict=True):
        assert torch.equal(old, new)
        assert not torch.allclose(new, live, atol=1e-2)
    for loss in (output.sum() for output in outputs(copied)):
        copied.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in copied.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_forward_keeps_the_names_of_its_arguments():
    model = build_model("gpt2", vocab_size=40)
    before = list(inspect.signature(model.forward).parameters)
    add_scoring(model, 40)
    assert list(inspect.signature(model.forward).parameters) == before


def test_position_ids_start_at_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unknown_transforms_of_logits_are_refused_in_any_precision(monkeypatch: pytest.MonkeyPatch, dtype):
    """Gemma 2 whose logits are far below its soft cap, so that the cap alone hardly shows in them."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=30.0, **SMALL)).to(dtype).eval()
    assert model(torch.arange(1, 9)[None]).logits.abs().max() < 3.0
    check_head(model, "student")
    read = LMHead.of
    for change in ({"softcap": None}, {"scale": 1.09}, {"scale": 1.02}):
        monkeypatch.setattr(LMHead, "of", lambda model, change=change: dataclasses.replace(read(model), **change))
        with pytest.raises(ValueError, match=r"LM head of the student .* is not reproduced"):
            check_head(model, "student")
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unknown_transforms_of_hidden_states_are_refused_in_any_precision(monkeypatch: pytest.MonkeyPatch, dtype):
    model = build_model("llama", vocab_size=40).to(dtype)
    monkeypatch.setattr(
        "minillm_trl.models.lm_head.completion_hidden_states", lambda *args: completion_hidden_states(*args) * 1.05
    )
    with pytest.raises(ValueError, match="transforms hidden states or logits in a way that is not supported"):
        check_head(model, "teacher")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_decoding_of_all_families_are_reproduced_in_half_precision(family: str, dtype: torch.dtype):
    model = build_model(family, layers=6).to(dtype)
    check_head(model, "student")
    check_decoding(model, "student")


def test_decoding_that_is_off_is_refused_in_half_precision(monkeypatch: pytest.MonkeyPatch):
    """Positions that go wrong by one with the cache, of learned positions of a small size."""
    model = build_model("gpt2").to(torch.float16)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(0.05)
    check_decoding(model, "student")
    monkeypatch.setattr("minillm_trl.rollouts.decoding.position_ids", lambda mask: position_ids(mask) + 1)
    with pytest.raises(ValueError, match="cannot decode several tokens at a time"):
        check_decoding(model, "student")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=2.0, **SMALL)), id="soft-capping"),
        pytest.param(lambda: CohereForCausalLM(CohereConfig(logit_scale=0.25, **SMALL)), id="logit scale"),
        pytest.param(lambda: build_model("llama", vocab_size=40), id="plain"),
    ],
)
def test_head_reproduces_the_logits_of_the_family(model):
    torch.manual_seed(0)
    model = model().eval()
    check_head(model, "student")
    ids = torch.randint(40, (2, 6))
    hidden = completion_hidden_states(model, ids, torch.ones_like(ids), 5)
    torch.testing.assert_close(LMHead.of(model).logits(hidden, 40), model(ids).logits[:, :-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("is_trained", "tokens"), [(True, 10), (False, 2)])
def test_chunks_of_a_large_head_that_is_trained_grow_with_its_gradient(
    monkeypatch: pytest.MonkeyPatch, is_trained: bool, tokens: int
):
    """A fourth of (V, H) = (50, 40) are 500 logits: ten tokens of 50."""
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", 100)
    sizes = []

    def loss_of(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return scores.logps

    hidden, weight = torch.randn(2, 12, 40, requires_grad=True), torch.randn(50, 40, requires_grad=is_trained)
    ids, mask = torch.randint(50, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    request = ScoreRequest(ids, mask, mask, loss=loss_of)
    score_hidden_states(hidden, LMHead(weight, None), request, 50).loss.backward()
    assert sizes == [tokens] * (24 // tokens) + [24 % tokens] * (24 % tokens > 0)
