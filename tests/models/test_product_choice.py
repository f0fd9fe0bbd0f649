"""Which products oneDNN takes, at the bounds of sizes, precisions and modes, and that all of them are right."""

import types

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from minillm_trl.models import packed_weights as packing
from minillm_trl.models import trained_products
from minillm_trl.models.packed_weights import is_plain_float32, multiply, packed_weights, packs_weights, suits_onednn
from minillm_trl.models.trained_products import use_onednn_products

pytestmark = pytest.mark.skipif(not packs_weights(), reason="oneDNN's products are used on x86 CPUs only")

LEAST = (256, 256)  # 2^16 elements


def is_packed(module: torch.nn.Module) -> bool:
    with packed_weights([module], tokens=16):
        return hasattr(module, "packed_weight")


class TestPacking:
    @pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
    @pytest.mark.parametrize(("shape", "expected"), [(LEAST, True), ((256, 255), False)])
    def test_layers_are_packed_from_a_size_on(self, kind: type, shape: tuple[int, int], expected: bool):
        assert is_packed(kind(*shape)) == expected

    def test_other_layers_are_not_packed(self):
        class Subclass(torch.nn.Linear):
            """One with a product of its own, perhaps."""

        empty = torch.nn.Linear(*LEAST)
        empty.weight = torch.nn.Parameter(torch.zeros(2**16))  # as of a layer that is sharded
        buffer = torch.nn.Linear(*LEAST)
        del buffer.weight
        buffer.register_buffer("weight", torch.zeros(LEAST))
        others = [
            *(Subclass(*LEAST), torch.nn.Embedding(*LEAST), torch.nn.Linear(*LEAST, device="meta"), empty, buffer),
            *(torch.nn.Linear(*LEAST, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)),
        ]
        assert not any(is_packed(module) for module in others)

    def test_forward_that_somebody_else_has_replaced_stays(self):
        layer = torch.nn.Linear(*LEAST)
        layer.forward = own = types.MethodType(lambda self, states: 0.0 * states, layer)
        with packed_weights([layer], tokens=16):
            assert vars(layer)["forward"] is own
            assert not hasattr(layer, "packed_weight")
        assert vars(layer)["forward"] is own

    def test_model_that_is_given_twice_is_packed_once_and_unpacked(self):
        model = torch.nn.Sequential(torch.nn.Linear(*LEAST))
        with packed_weights([model, model, model[0]], tokens=16):
            assert hasattr(model[0], "packed_weight")
        assert not {"packed_weight", "forward"} & vars(model[0]).keys()

    @pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
    @pytest.mark.parametrize(
        "shape", [(256,), (1, 256), (33, 256), (3, 11, 256), (2, 0, 256), (2, 2, 2, 256)], ids=str
    )
    def test_packed_layers_take_states_of_any_shape(self, kind: type, shape: tuple[int, ...]):
        torch.manual_seed(0)
        layer, states = kind(300, 256) if kind is Conv1D else kind(256, 300), torch.randn(shape)
        torch.nn.init.normal_(layer.bias)
        with torch.no_grad(), packed_weights([layer], tokens=16):
            found = layer(states)
        torch.testing.assert_close(found, layer(states).detach(), rtol=1e-4, atol=1e-4)

    def test_packed_layers_take_their_own_product_where_onednn_has_none(self):
        layer = torch.nn.Linear(*LEAST)
        states = torch.randn(3, 256)
        with packed_weights([layer], tokens=16):
            assert layer(states).requires_grad
            assert not layer(input=states.detach()).isnan().any()
            with torch.no_grad():
                assert layer(input=states).shape == (3, 256)
                with pytest.raises(TypeError):
                    layer(states, states)
                with pytest.raises(TypeError):
                    layer(states, scale=2.0)
                with pytest.raises(RuntimeError, match="dtype"):
                    layer(states.double())
                with torch.autocast("cpu", torch.bfloat16):
                    assert layer(states).dtype == torch.bfloat16
                with torch.backends.mkldnn.flags(enabled=False):
                    expected = torch.nn.functional.linear(states, layer.weight, layer.bias)
                    assert torch.equal(layer(states), expected)


class TestHeads:
    def test_products_from_a_size_on_without_gradients_or_autocast(self):
        states, weight = torch.zeros(1, 256), torch.zeros(LEAST)
        assert not suits_onednn(states, weight)  # gradients are on
        with torch.no_grad():
            assert suits_onednn(states, weight)
            assert not suits_onednn(states, weight[:-1])
            assert not suits_onednn(states[:0], weight)
            assert not suits_onednn(states.double(), weight)
            assert not suits_onednn(states, weight.double())
            assert not suits_onednn(states, weight.to("meta"))
            with torch.autocast("cpu", torch.bfloat16):
                assert not suits_onednn(states, weight)
            with torch.backends.mkldnn.flags(enabled=False):
                assert not suits_onednn(states, weight)

    def test_plain_tensors_are_float32_on_a_cpu(self):
        assert is_plain_float32(torch.nn.Parameter(torch.zeros(1)))
        assert not is_plain_float32(torch.zeros(1, dtype=torch.float64))
        assert not is_plain_float32(torch.zeros(1, device="meta"))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(1, 8), (47, 8), (5, 13, 8)], ids=str)
    def test_product_has_no_trace_of_the_rows_that_were_added(self, shape: tuple[int, ...], bias: bool):
        torch.manual_seed(0)
        states, weight = torch.randn(shape), torch.randn(5, 8)
        summand = torch.randn(5) if bias else None
        expected = torch.nn.functional.linear(states.double(), weight.double(), summand.double() if bias else None)
        torch.testing.assert_close(multiply(states, weight, summand).double(), expected, rtol=1e-5, atol=1e-5)


class TestUpdates:
    @pytest.fixture
    def products(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Numbers of rows that oneDNN multiplies."""
        rows: list[int] = []
        monkeypatch.setattr(
            trained_products, "multiply", lambda states, *rest: rows.append(len(states)) or multiply(states, *rest)
        )
        return rows

    @pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
    @pytest.mark.parametrize(
        ("shape", "rows", "expected"), [(LEAST, 64, True), (LEAST, 63, False), ((256, 255), 64, False)], ids=str
    )
    def test_layers_multiply_from_a_size_on(self, products, kind: type, shape, rows: int, expected: bool):
        layer = kind(*shape)
        use_onednn_products(layer)
        layer(torch.zeros(rows, layer.weight.shape[0 if kind is Conv1D else 1]))
        assert products == [rows] * expected

    @pytest.mark.parametrize(
        ("shape", "expected"), [((1, 63, 256), []), ((63, 1, 256), []), ((4, 16, 256), [4]), ((256,), [])], ids=str
    )
    def test_rows_are_those_of_all_sequences(self, products, shape: tuple[int, ...], expected: list[int]):
        layer = torch.nn.Linear(*LEAST)
        use_onednn_products(layer)
        layer(torch.zeros(shape))
        assert products == expected

    def test_states_of_another_type_and_further_arguments_are_left_to_the_layer(self, products):
        class Sharded(torch.Tensor):
            """States that are not a plain tensor."""

        layer, states = torch.nn.Linear(*LEAST), torch.zeros(64, 256)
        use_onednn_products(layer)
        layer(states.as_subclass(Sharded))
        for arguments in ((), (states, states)):
            with pytest.raises(TypeError, match="positional argument"):
                layer(*arguments)
        assert not products

    def test_other_layers_and_processors_keep_their_products(self, products, monkeypatch: pytest.MonkeyPatch):
        class Subclass(torch.nn.Linear):
            """One with a product of its own, perhaps."""

        changed = torch.nn.Linear(*LEAST)
        changed.forward = types.MethodType(lambda self, states: 0.0 * states, changed)
        layers = [Subclass(*LEAST), changed, torch.nn.Linear(*LEAST, device="meta")]
        for layer in layers:
            before = vars(layer).get("forward")
            use_onednn_products(layer)
            assert vars(layer).get("forward") is before
        monkeypatch.setattr(trained_products, "packs_weights", lambda: False)
        layer = torch.nn.Linear(*LEAST)
        use_onednn_products(layer)
        assert "forward" not in vars(layer)
        assert not products

    @pytest.mark.parametrize("trained", ["states", "weight", "bias"])
    def test_each_gradient_alone_is_that_of_the_formula(self, trained: str):
        """Of 67 rows, which products pad."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 300).requires_grad_(False)
        states, target = torch.randn(67, 256), torch.randn(67, 300)
        use_onednn_products(layer)
        each = {"states": states, "weight": layer.weight, "bias": layer.bias}[trained].requires_grad_()
        (found,) = torch.autograd.grad((layer(states) * target).sum(), each)
        x, t, w = states.detach().double(), target.double(), layer.weight.detach().double()
        expected = {"states": t @ w, "weight": t.T @ x, "bias": t.sum(0)}[trained]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_kernels_are_those_of_x86_with_all_operators(monkeypatch: pytest.MonkeyPatch):
    for machine, operators, expected in (
        ("x86_64", ("_linear_pointwise", "_reorder_linear_weight"), True),
        ("AMD64", ("_linear_pointwise",), True),
        ("arm64", ("_linear_pointwise",), False),
        ("x86_64", ("_linear_pointwise", "_none"), False),
    ):
        monkeypatch.setattr(packing.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(packing, "_OPERATORS", operators)
        assert packing._has_kernels.__wrapped__() == expected
