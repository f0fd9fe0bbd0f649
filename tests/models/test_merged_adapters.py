"""Adapters merged into the copy that samples: the same distribution and samples, and trained weights untouched."""

import logging
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from peft import HiraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_trainer import make_config, make_trainer

from minillm_trl.models.merged_adapters import adapted_layers, whole_tensor
from minillm_trl.models.student_copy import RolloutCopy
from minillm_trl.rollouts.sampling import sample_prompts

IDS = torch.arange(2, 42).view(4, 10)
LAYERS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=LAYERS),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=LAYERS),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=LAYERS),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "tokens": LoraConfig(r=4, target_modules=LAYERS, trainable_token_indices=[3, 5]),
    "loha": LoHaConfig(r=4, target_modules=LAYERS),
    "oft": OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "hira": HiraConfig(r=4, target_modules=LAYERS),
}


def adapted(config, family: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model whose adapters change it a lot."""
    model = get_peft_model(build_model(family).to(dtype), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def copied_from(model: torch.nn.Module, dtype: torch.dtype | None = None, sharded: bool = False) -> RolloutCopy:
    base = model.get_base_model()
    return RolloutCopy(base, dtype, sharded, adapted_layers(base))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_merged_copy_is_the_adapted_model_and_follows_it(kind: str):
    model = adapted(KINDS[kind])
    copied = copied_from(model)
    for _ in range(2):
        before, expected = state(model), model(IDS).logits
        with model.disable_adapter():
            assert (model(IDS).logits - expected).abs().max() > 0.1
        copied.refresh(model.get_base_model())
        layers = [each for each in copied.model.modules() if isinstance(each, BaseTunerLayer)]
        assert layers
        assert all(layer.merged for layer in layers)
        torch.testing.assert_close(copied.model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
        copied.release()
        assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
        assert not any(each.merged for each in model.modules() if isinstance(each, BaseTunerLayer))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)


@torch.no_grad()
def test_adapters_of_several_parameters_of_a_layer_are_merged():
    """peft puts the adapters of a mixture's experts into each other."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names), "qwen3_moe")
    base, expected = model.get_base_model(), model(IDS).logits
    layers = {layer.names[0]: layer for layer in adapted_layers(base)}
    assert [len(layer.names) for layer in layers.values()] == [1, 2, 1, 2]
    copied = copied_from(model)
    torch.testing.assert_close(copied.model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert (model(IDS).logits - expected).abs().max() > 0.1


@torch.no_grad()
def test_sum_of_several_adapters_is_rounded_once():
    model = adapted(KINDS["lora"], dtype=torch.bfloat16)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    changes = [layer.get_delta_weight(name).float() for name in ("default", "other")]
    found = copied_from(model).model.model.layers[1].self_attn.q_proj.get_base_layer().weight
    assert torch.equal(found, (layer.get_base_layer().weight.float() + changes[0] + changes[1]).bfloat16())


def test_merged_layers_run_no_product_of_an_adapter():
    model = adapted(KINDS["lora"])
    copied, calls = copied_from(model), []
    for other in (model, copied.model):
        for name, module in other.named_modules():
            if "lora_A." in name or "lora_B." in name:
                module.register_forward_hook(lambda *unused: calls.append(1))
    copied.model(IDS)
    assert not calls
    model(IDS)
    assert len(calls) == 2 * 2 * len(LAYERS)


@torch.no_grad()
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_half_precision_copy_rounds_the_sum_once(base: torch.dtype, sharded: bool):
    model = adapted(KINDS["lora"], dtype=base)
    copied = copied_from(model, torch.bfloat16, sharded)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    found = copied.model.model.layers[1].self_attn.q_proj.get_base_layer().weight
    expected = (layer.get_base_layer().weight.float() + layer.get_delta_weight("default")).bfloat16()
    assert torch.equal(found, expected)
    assert {each.dtype for each in copied.model.parameters()} <= {torch.bfloat16, torch.float32}
    others = {name: each.dtype for name, each in copied.model.named_parameters() if "lora_" not in name}
    assert set(others.values()) == {torch.bfloat16}


@torch.no_grad()
def test_merged_weights_have_the_precision_of_the_weights_around_them():
    model = adapted(KINDS["lora"], dtype=torch.float16)  # which a copy in bfloat16 shares
    copied = copied_from(model, torch.bfloat16)
    expected = model(IDS).logits
    torch.testing.assert_close(copied.model(IDS).logits, expected, rtol=0.05, atol=0.05)


def test_memory_is_freed_between_rollouts_and_nothing_is_copied_twice():
    model = adapted(KINDS["lora"])
    copied = copied_from(model)
    shared = {id(each) for each in model.parameters()}

    def own() -> int:
        return sum(each.numel() for each in copied.model.parameters() if id(each) not in shared)

    layers = [layer.base.weight.numel() for layer in adapted_layers(model.get_base_model())]
    assert own() == sum(layers)
    copied.release()
    assert own() == 0
    half = copied_from(model, torch.bfloat16)
    names = {name for name in half._copies if "base_layer" in name or "lora_" in name}
    assert not names


@torch.no_grad()
def test_refreshed_weights_keep_their_address_for_compiled_code():
    model = adapted(KINDS["lora"])
    copied = copied_from(model)
    places = {name: each.data_ptr() for name, each in copied.model.named_parameters()}
    for parameter in model.parameters():
        parameter.data *= 1.0 + 0.5 * parameter.requires_grad
    copied.refresh(model.get_base_model())
    assert {name: each.data_ptr() for name, each in copied.model.named_parameters()} == places
    torch.testing.assert_close(copied.model(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_quantised_weights_and_disabled_adapters_are_left_out():
    model = adapted(KINDS["lora"])
    base = model.get_base_model()
    assert len(adapted_layers(base)) == 2 * len(LAYERS)
    quantised = base.model.layers[0].self_attn.q_proj.get_base_layer()
    quantised._parameters["weight"] = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert len(adapted_layers(base)) == 2 * len(LAYERS) - 1
    model.disable_adapter_layers()
    assert adapted_layers(base) == []
    assert adapted_layers(build_model("llama")) == []


class Packed(torch.nn.Parameter):
    """As 4-bit weights that are stored as floating-point numbers."""


@pytest.mark.parametrize(
    "weight", [Packed(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), False)]
)
def test_quantised_weights_with_a_bias_are_left_out(weight: torch.nn.Parameter):
    base = adapted(LoraConfig(r=4, target_modules=["q_proj"]), "opt").get_base_model()
    layers = adapted_layers(base)
    assert [layer.names for layer in layers] == [[f"model.decoder.layers.{i}.self_attn.q_proj"] for i in range(2)]
    assert set(layers[0].base._parameters) == {"weight", "bias"}
    layers[0].base._parameters["weight"] = weight
    assert [layer.names for layer in adapted_layers(base)] == [layers[1].names]
    layers[1].base._parameters.update(weight=None, bias=None)
    assert adapted_layers(base) == []


def test_layers_without_an_active_adapter_are_left_out():
    model = adapted(KINDS["lora"])
    base = model.get_base_model()
    assert adapted_layers(base)
    model.delete_adapter("default")
    assert adapted_layers(base) == []


def test_memory_that_is_not_there_is_an_error(monkeypatch):
    def merge(*unused, **options):
        raise torch.OutOfMemoryError("full")

    model = adapted(KINDS["lora"])
    monkeypatch.setattr(type(model.get_base_model().model.layers[0].self_attn.q_proj), "merge", merge)
    with pytest.raises(torch.OutOfMemoryError):
        copied_from(model)


def test_weights_that_deepspeed_shards_are_gathered_while_they_are_read(monkeypatch):
    weight, gathered = torch.nn.Parameter(torch.zeros(0)), []

    @contextmanager
    def gather(parameters: list):
        (given,) = parameters
        given.data = torch.ones(2)
        gathered.append(given)
        yield
        given.data = torch.zeros(0)

    zero = SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    with whole_tensor(weight) as values:
        assert values.numel() == 0
    assert not gathered
    weight.ds_id = 0
    with whole_tensor(weight) as values:
        assert values.tolist() == [1.0, 1.0]
    assert gathered == [weight]
    assert weight.numel() == 0


@torch.no_grad()
def test_kinds_that_cannot_be_merged_run_layer_by_layer_with_a_warning(caplog):
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]))
    with caplog.at_level(logging.WARNING, logger="minillm_trl"):
        copied = copied_from(model, torch.bfloat16)
    assert caplog.text.count("layer by layer") == 1
    assert "(aLoRA does not support merging.)" in caplog.text
    layer = copied.model.model.layers[0].self_attn.q_proj
    assert not layer.merged
    trained = model.get_base_model().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(layer.get_base_layer().weight, trained.bfloat16())


@torch.no_grad()
def test_layer_with_one_adapter_that_cannot_be_merged_runs_all_of_them():
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    alora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    model.add_adapter("other", alora)
    model.base_model.set_adapter(["default", "other"])
    base = model.get_base_model()
    torch.testing.assert_close(copied_from(model).model(IDS).logits, base(IDS).logits)


def test_samples_are_those_of_the_adapters():
    model = adapted(KINDS["lora"])
    options = {"keys": [(row,) for row in range(4)], "max_new_tokens": 24, "eos_token_ids": [0], "pad_token_id": 1}
    prompts = IDS.tolist()
    expected = sample_prompts(model.get_base_model(), prompts, **options)
    assert sample_prompts(copied_from(model).model, prompts, **options) == expected
    with model.disable_adapter():
        assert sample_prompts(model.get_base_model(), prompts, **options) != expected


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16": True, "half_precision_rollouts": True}], ids=str)
def test_trainer_samples_merged_trains_the_adapters_and_frees_the_rest(tmp_path, options: dict):
    def train(**more) -> tuple[torch.Tensor, list[bool]]:
        trainer = make_trainer(
            tmp_path,
            family="llama",
            peft_config=LoraConfig(r=4, target_modules=LAYERS),
            max_steps=4,
            **options,
            **more,
        )
        torch.manual_seed(3)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        frozen = {name: each.clone() for name, each in trainer.model.named_parameters() if not each.requires_grad}
        merged: list[bool] = []
        chosen = trainer._mixing.applied_to

        def applied_to(sampler, student, *arguments):
            layers = [each for each in student.modules() if isinstance(each, BaseTunerLayer)]
            merged.append(all(layer.merged for layer in layers))
            return chosen(sampler, student, *arguments)

        trainer._mixing.applied_to = applied_to
        trainer.train()
        assert all(
            torch.equal(each, frozen[name]) for name, each in trainer.model.named_parameters() if name in frozen
        )
        adapters = torch.cat([each.detach().flatten() for each in trainer.model.parameters() if each.requires_grad])
        return adapters, merged

    (merging, merged), (plain, unmerged) = train(), train(merged_rollouts=False)
    assert merged
    assert all(merged)
    assert not any(unmerged)
    if not options:  # in half precision, samples may differ
        torch.testing.assert_close(merging, plain, rtol=1e-3, atol=1e-4)


def test_merging_is_refused_where_it_has_no_effect(tmp_path):
    with pytest.raises(ValueError, match="no adapters on weights"):
        make_trainer(tmp_path, merged_rollouts=True)
    with pytest.raises(ValueError, match="merged_rollouts=True has no effect with top_p"):
        make_config(tmp_path, merged_rollouts=True, top_p=0.9, teacher_mixed_alpha=0.0)
