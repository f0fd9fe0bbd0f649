"""oneDNN's products in updates: the same values and gradients, where they pay, in whole trainings as well."""

import copy

import pytest
import torch
from conftest import build_model
from test_packed_weights import make_model, packed_modules
from test_trainer import make_trainer, weights
from transformers.pytorch_utils import Conv1D

from minillm_trl.models import trained_products
from minillm_trl.models.fused_head import add_scoring
from minillm_trl.models.loading import load_model
from minillm_trl.models.packed_weights import packed_weights, packs_weights, pad_rows, suits_onednn
from minillm_trl.models.trained_products import LEAST_ROWS, use_onednn_products

pytestmark = pytest.mark.skipif(not packs_weights(), reason="oneDNN's products are used on x86 CPUs only")

IDS = torch.arange(80).view(8, 10)


class Sharded(torch.Tensor):
    """A weight that is not a plain tensor."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that oneDNN multiplies."""
    shapes: list[tuple[int, ...]] = []
    multiply = trained_products.multiply

    def noting(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return multiply(states, weight, bias)

    monkeypatch.setattr(trained_products, "multiply", noting)
    return shapes


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    loss = model(input_ids=IDS).logits.square().mean()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "head with a bias"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_plain_products(calls, kind: str, checkpointing: bool):
    model = make_model(kind)
    if checkpointing:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    expected = gradients(model)
    assert not calls
    use_onednn_products(model)
    found = gradients(model)
    assert calls
    assert any(not torch.equal(found[name], expected[name]) for name in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_in_float64_of_one_layer():
    """Against the formulas, to the rounding of float32."""
    torch.manual_seed(0)
    for layer in (torch.nn.Linear(256, 300), Conv1D(300, 256)):
        torch.nn.init.normal_(layer.bias)
        states = torch.randn(2, 40, 256, requires_grad=True)
        use_onednn_products(layer)
        target = torch.randn(2, 40, 300)
        found = torch.autograd.grad((layer(states) * target).sum(), [states, layer.weight, layer.bias])
        x, t = states.detach().double(), target.double()
        weight = layer.weight.double() if type(layer) is Conv1D else layer.weight.double().t()
        of_weight = x.flatten(0, 1).t() @ t.flatten(0, 1)
        expected = [t @ weight.t(), of_weight if type(layer) is Conv1D else of_weight.t(), t.sum(dim=(0, 1))]
        for actual, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(states).double(), x @ weight + layer.bias.double(), rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient_and_cost_no_product(calls):
    layer = torch.nn.Linear(256, 300).requires_grad_(False)
    use_onednn_products(layer)
    layer(torch.randn(80, 256, requires_grad=True)).sum().backward()
    assert calls == [(300, 256), (256, 300)]
    assert layer.weight.grad is None


@pytest.mark.parametrize("frozen", [True, False])
def test_states_are_kept_only_for_the_gradient_of_a_weight(frozen: bool):
    kept: list[tuple[int, ...]] = []
    layer = torch.nn.Linear(256, 300).requires_grad_(not frozen)
    use_onednn_products(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(tuple(each.shape)), lambda each: each):
        layer(torch.randn(80, 256, requires_grad=True))
        layer(torch.randn(80, 256))
    assert kept == ([(300, 256)] if frozen else [(80, 256), (300, 256), (80, 256)])


def test_gradients_of_gradients_are_those_of_plain_products():
    torch.manual_seed(0)
    layer, states = torch.nn.Linear(256, 300), torch.randn(80, 256, requires_grad=True)
    found = []
    for _ in range(2):
        inputs = [states, layer.weight, layer.bias]
        first = torch.autograd.grad(layer(states).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().mean() for each in first), inputs))
        use_onednn_products(layer)
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)


def test_where_it_does_not_pay_products_stay_as_they_are(calls):
    layer = torch.nn.Linear(256, 300)
    use_onednn_products(layer)
    layer(torch.randn(LEAST_ROWS - 1, 256))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(80, 256)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        layer(torch.randn(80, 256))
    layer.double()(torch.randn(80, 256, dtype=torch.float64))
    layer.float().weight = torch.nn.Parameter(torch.randn(300, 256).as_subclass(Sharded))
    layer(torch.randn(80, 256))
    small = torch.nn.Linear(128, 128)
    use_onednn_products(small)
    small(torch.randn(80, 128))
    assert not calls


def test_arguments_that_a_layer_does_not_take_are_refused_as_by_the_layer(calls):
    layer = torch.nn.Linear(256, 300)
    use_onednn_products(layer)
    with pytest.raises(TypeError):
        layer(torch.randn(80, 256), scale=2.0)
    layer(input=torch.randn(80, 256))
    assert not calls


@pytest.mark.parametrize("suits", [suits_onednn, trained_products._suits])
def test_compiled_code_keeps_its_own_products(suits):
    def chosen(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return states + 1 if suits(states, weight) else states

    states, weight = torch.zeros(80, 256), torch.zeros(300, 256)
    with torch.no_grad():
        assert chosen(states, weight).any()
        assert not torch.compile(chosen, backend="eager", fullgraph=True)(states, weight).any()


def test_models_can_still_be_packed_and_copied(calls):
    model = make_model("llama")
    plain = packed_modules(model)
    use_onednn_products(model)
    with packed_weights([model], tokens=16):
        assert "lm_head" in packed_modules(model) != plain
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
        assert copied(IDS).logits.abs().max() > 0
    assert calls


def test_models_of_subcommands_score_with_them(tmp_path, calls):
    make_model("llama").save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    with torch.no_grad():
        found = model(IDS).logits
    assert calls
    torch.testing.assert_close(found, make_model("llama").eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_models_saved_whole_keep_their_weights_and_get_the_products_again(tmp_path, calls):
    """As by `torch.save(trainer.model)`; the trained model also has a head that scores."""
    model = make_model("llama")
    use_onednn_products(model)
    add_scoring(model, 600)
    expected = model(IDS).logits
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    calls.clear()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not calls
    for _ in range(2):  # the second time changes nothing
        use_onednn_products(loaded)
        calls.clear()
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 7  # the feed-forward layers of two blocks, and the head


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_trainings_with_and_without_reach_the_same_weights(tmp_path, monkeypatch, calls, options: dict):
    def train() -> torch.Tensor:
        models = {name: build_model("llama", seed=seed, width=192) for seed, name in enumerate(("student", "teacher"))}
        trainer = make_trainer(tmp_path, **models, max_steps=2, optim="sgd", learning_rate=0.01, **options)
        trainer.train()
        return weights(trainer)

    monkeypatch.setattr(trained_products, "LEAST_ROWS", 8)
    start = torch.cat([each.detach().flatten() for each in build_model("llama", width=192).parameters()])
    found = train()
    assert calls
    with torch.backends.mkldnn.flags(enabled=False):
        expected = train()
    assert (found - expected).norm() < 1e-3 * (expected - start).norm()


@pytest.mark.parametrize("rows", [1, 31, 33, 100, 513, 1000])
def test_rows_are_padded_with_zeros_by_a_sixteenth_at_most(rows: int):
    states = torch.randn(rows, 3)
    padded = pad_rows(states)
    assert torch.equal(padded[:rows], states)
    assert not padded[rows:].any()
    assert rows <= len(padded) <= rows * 17 / 16
    if rows < 32:
        assert padded is states


def test_batches_of_many_lengths_have_few_shapes_of_products(monkeypatch):
    """oneDNN keeps a kernel and its memory for each shape."""
    shapes = []
    linear = torch.ops.mkldnn._linear_pointwise

    def noting(states, weight, *rest):
        shapes.append((*states.shape, *weight.shape))
        return linear(states, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noting)
    layer = torch.nn.Linear(256, 256)
    use_onednn_products(layer)
    for length in range(512, 1024, 7):
        states = torch.randn(1, length, 256, requires_grad=True)
        layer(states).sum().backward()
    assert len(shapes) == 3 * 74
    assert len(set(shapes)) <= 2 * 17  # W h and its gradient of h share their shapes, as the weight is square
