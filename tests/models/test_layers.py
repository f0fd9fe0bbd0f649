"""Decoder layers and their feed-forward layers: which they are, and computing without some of them.

`test_shrink.py` has what shrunken models and measurements of real families compute.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig

from minillm_trl.errors import UserError
from minillm_trl.models.layer_importance import block_influence, channel_importance
from minillm_trl.models.layers import decoder_layers, feed_forward_layers, intermediate_size, skipping

IDS = torch.arange(2, 26).view(2, 12)
MASK = torch.ones_like(IDS)


class Layer(torch.nn.Module):
    """Turns states by 90 degrees and hands two more results on, as layers of models with code of their own do."""

    def forward(self, hidden_states: torch.Tensor, more: str) -> tuple:
        return torch.stack([-hidden_states[..., 1], hidden_states[..., 0]], dim=-1), more, "weights"


class Turning(torch.nn.Module):
    """Three layers, called with keywords or without."""

    def __init__(self, keywords: bool):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))
        self.layers = torch.nn.ModuleList([Layer(), Layer(), Layer()])
        self.keywords = keywords

    def forward(self, input_ids: torch.Tensor, **unused: object) -> torch.Tensor:
        states = torch.stack([input_ids, torch.zeros_like(input_ids)], dim=-1).float()
        for layer in self.layers:
            states, *others = layer(hidden_states=states, more="cache") if self.keywords else layer(states, "cache")
            assert others == ["cache", "weights"]
        return states


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("keywords", [False, True])
class TestLayersThatReturnMore:
    def test_skipped_ones_hand_their_input_on(self, keywords: bool):
        model, ids = Turning(keywords), torch.ones(1, 1)
        turned = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-0.0, -1.0]]  # by the number of layers
        for kept in ([], [1], [0, 2], [0, 1, 2]):
            with skipping(model, kept):
                assert model(ids)[0, 0].tolist() == turned[len(kept)]
        assert hooks(model) == 0
        assert model(ids)[0, 0].tolist() == turned[3]

    def test_influence_of_a_quarter_turn_is_one(self, keywords: bool):
        assert block_influence(Turning(keywords), [(torch.ones(2, 3), torch.ones(2, 3))]).tolist() == [1.0] * 3


def test_hooks_go_with_an_error():
    model, channels = build_model("llama"), [torch.tensor([0])] * 2
    with skipping(model, [0], channels):
        assert hooks(model) == 3
    with pytest.raises(ArithmeticError), skipping(model, [0], channels):
        raise ArithmeticError
    assert hooks(model) == 0


class TestWhichAreTheLayers:
    def test_deeper_lists_of_as_many_modules_are_no_layers(self):
        model = build_model("llama")
        model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        model.model.heads = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 3)
        name, layers = decoder_layers(model)
        assert name == "model.layers"
        assert layers is model.model.layers

    def test_two_lists_beside_each_other_are_refused(self):
        model = build_model("llama")
        model.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be shrunk: 2 of its lists .* layers \(2\)"):
            decoder_layers(model)

    def test_model_without_such_a_list_is_refused(self):
        model = build_model("llama")
        model.model.layers = torch.nn.ModuleList([model.model.layers[0]])
        with pytest.raises(UserError, match="0 of its lists"):
            decoder_layers(model)


class TestFeedForward:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (LlamaConfig(intermediate_size=48), 48),
            (OPTConfig(ffn_dim=40), 40),
            (GPT2Config(n_inner=24), 24),
            (GPT2Config(n_embd=16), 64),
            (Gemma3Config(text_config={"intermediate_size": 56}), 56),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_width_is_that_of_the_configuration(self, config, expected: int):
        assert intermediate_size(config) == expected

    def test_unknown_width_is_refused(self):
        with pytest.raises(UserError, match="layers of bloom cannot be narrowed: their width is not known"):
            intermediate_size(BloomConfig())

    @pytest.mark.parametrize("name", ["self_attn", "attention"])
    def test_attention_of_the_same_width_is_not_taken_for_it(self, name: str):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16))
        for layer in model.model.layers:
            setattr(layer, name, layer._modules.pop("self_attn"))
            assert layer.get_submodule(name).q_proj.weight.shape == layer.mlp.up_proj.weight.shape
        for index, found in enumerate(feed_forward_layers(model)):
            prefix = f"model.layers.{index}.mlp"
            assert found.up == (f"{prefix}.gate_proj", f"{prefix}.up_proj")
            assert found.down == f"{prefix}.down_proj"

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.add_module("shared", build_model("llama").model.layers[0].mlp),
            lambda layer: layer.mlp.add_module("third", torch.nn.Linear(32, 64)),
            lambda layer: layer.mlp.add_module("second", torch.nn.Linear(64, 32)),
            lambda layer: layer._modules.pop("mlp"),
        ],
        ids=["two", "three projections up", "two projections down", "none"],
    )
    def test_anything_but_one_plain_layer_is_refused(self, change):
        model = build_model("llama")
        assert len(feed_forward_layers(model)) == 2
        change(model.model.layers[1])
        with pytest.raises(UserError, match="layer 1 has no plain pair of projections from 32 to 64 channels"):
            feed_forward_layers(model)


@pytest.mark.parametrize("measure", [block_influence, channel_importance])
class TestMeasurements:
    def test_model_is_left_as_it_was(self, measure):
        model = build_model("llama")
        for found in measure(model, [(IDS, MASK)]):
            assert found.dtype == torch.float64
            assert not found.requires_grad
        assert hooks(model) == 0

    def test_padding_on_the_left_changes_nothing(self, measure):
        model = build_model("llama")  # its attention sees distances alone
        padded, mask = torch.nn.functional.pad(IDS, (3, 0), value=7), torch.nn.functional.pad(MASK, (3, 0))
        for found, expected in zip(measure(model, [(padded, mask)]), measure(model, [(IDS, MASK)]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    def test_half_precision_is_measured_in_full(self, measure):
        model, seen = build_model("llama").bfloat16(), []
        found = measure(model, [(IDS, MASK)])
        layer = model.model.layers[1]
        if measure is block_influence:
            layer.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
        else:
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given))
        with torch.no_grad():
            model(IDS)
        states = [each.double() for each in seen[0]]
        if measure is block_influence:
            expected = 1 - torch.nn.functional.cosine_similarity(*states, dim=-1).mean()
        else:
            expected = states[0].abs().mean(dim=(0, 1))
        torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-6)
