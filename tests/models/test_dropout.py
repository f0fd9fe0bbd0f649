"""`disable_dropout` switches off dropout outside of `torch.nn.Dropout`, and changes nothing else."""

import pytest
import torch
from conftest import build_model
from transformers import LlamaConfig, PreTrainedModel

from minillm_trl.models.dropout import disable_dropout


@pytest.mark.parametrize("family", ["opt", "bloom", "falcon"])
def test_model_in_training_mode_computes_what_it_does_in_eval_mode(family: str):
    model, ids = build_model(family), torch.arange(5, 13)[None]
    fields = {name: 0.5 for name, value in vars(model.config).items() if "drop" in name and isinstance(value, float)}
    assert fields
    model.config.update(fields)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.5)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GRPOTrainer does so
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert not torch.allclose(model.train()(ids).logits, expected)
        disable_dropout(model)
        assert torch.allclose(model(ids).logits, expected)
    assert {name: getattr(model.config, name) for name in fields} == fields  # as it is saved


def test_modules_that_read_no_probability_keep_the_configuration_of_the_model():
    model = build_model("gpt2")
    disable_dropout(model)
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_other_numbers_stay():
    layer = torch.nn.Linear(2, 2)
    layer.layerdrop, layer.hidden_dropout, layer.scale, layer.drops_first, layer.drop_name = 0.1, 0.2, 0.5, True, "x"
    disable_dropout(torch.nn.Sequential(layer))
    assert (layer.layerdrop, layer.hidden_dropout) == (0.0, 0.0)
    assert (layer.scale, layer.drops_first, layer.drop_name) == (0.5, True, "x")


def test_only_probabilities_of_a_configuration_change():
    config = LlamaConfig(attention_dropout=0.5, rms_norm_eps=0.25)
    config.update({"drop_path": None, "layerdrop": 0.5})

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

        def forward(self, states: torch.Tensor) -> tuple:
            return self.config.attention_dropout, self.config.drop_path, self.config.rms_norm_eps

    layers = torch.nn.Sequential(Layer(), Layer())
    disable_dropout(layers)
    assert layers[0](torch.ones(1)) == (0.0, None, 0.25)
    assert layers[0].config is layers[1].config is not config
    assert (layers[0].config.layerdrop, config.attention_dropout) == (0.5, 0.5)


def test_model_that_reads_its_configuration_keeps_it():
    class Model(PreTrainedModel):
        config_class = LlamaConfig

        def forward(self) -> float:
            return self.config.attention_dropout

    model = Model(LlamaConfig(attention_dropout=0.5))
    disable_dropout(model)
    assert model.config.attention_dropout == 0.5  # as it is saved
