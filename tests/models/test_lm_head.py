"""The head and the body of a model apart: what is read from the model, by value, and what is refused."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedConfig

from minillm_trl.errors import UserError
from minillm_trl.models.lm_head import (
    LMHead,
    check_embedded,
    check_head,
    completion_hidden_states,
    position_ids,
    rounding_tolerance,
    without_wrapper,
)


def head_of(softcap: float | None = None, scale: float = 1.0, bias: bool = True) -> LMHead:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.float64, generator=draws)
    return LMHead(weight, torch.randn(7, dtype=torch.float64, generator=draws) if bias else None, scale, softcap)


class TestHead:
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("scale", [1.0, 2.0])
    @pytest.mark.parametrize("bias", [True, False])
    def test_logits_and_their_gradient_are_those_of_the_formula(self, softcap, scale: float, bias: bool):
        head, states = head_of(softcap, scale, bias), torch.randn(5, 4, dtype=torch.float64)
        projected = head.project(states, 6).requires_grad_()
        raw = states @ head.weight[:6].T + (head.bias[:6] if bias else 0.0)
        torch.testing.assert_close(projected.detach(), raw)
        logits = head.transform(projected)
        expected = scale * raw if softcap is None else softcap * torch.tanh(scale * raw / softcap)
        torch.testing.assert_close(logits.detach(), expected)
        torch.testing.assert_close(head.logits(states, 6), expected)
        torch.testing.assert_close(head.teacher_logits(states, 6, student_logits=-expected), expected)
        gradient = torch.randn(5, 6, dtype=torch.float64)
        (reference,) = torch.autograd.grad(logits, projected, gradient)
        found = head.transform_gradient(gradient.clone(), None if softcap is None else logits.detach())
        torch.testing.assert_close(found, reference)

    def test_gradient_of_a_soft_cap_needs_the_logits(self):
        with pytest.raises(TypeError, match=r"soft cap \(softcap=2.0\) needs the logits"):
            head_of(2.0).transform_gradient(torch.ones(1, 7), None)

    @pytest.mark.parametrize(("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_logits_are_in_at_least_float32(self, dtype: torch.dtype, result: torch.dtype):
        head, states = LMHead(torch.ones(3, 2, dtype=dtype), None), torch.ones(1, 2)
        assert head.project(states, 3).dtype == dtype
        assert head.logits(states, 3).dtype == result

    @pytest.mark.parametrize("bias", [True, False])
    def test_frozen_head_is_a_detached_copy_elsewhere(self, bias: bool):
        head = head_of(2.0, 0.5, bias)
        packed = LMHead(head.weight.requires_grad_(), head.bias, head.scale, head.softcap, packed=torch.ones(1))
        frozen = packed.frozen(torch.device("cpu"))
        assert torch.equal(frozen.weight, head.weight)
        assert not frozen.weight.requires_grad
        assert (frozen.scale, frozen.softcap, frozen.packed) == (0.5, 2.0, None)
        if bias:
            packed.bias.requires_grad_()
            assert torch.equal(packed.frozen(torch.device("cpu")).bias, head.bias)
            assert not packed.frozen(torch.device("cpu")).bias.requires_grad
        elsewhere = packed.frozen(torch.device("meta"))
        assert {each.device.type for each in (elsewhere.weight, elsewhere.bias) if each is not None} == {"meta"}

    @pytest.mark.parametrize(
        ("options", "scale", "softcap"),
        [
            ({}, 1.0, None),
            ({"logit_scale": 0.25}, 0.25, None),
            ({"logits_scaling": 8.0}, 0.125, None),
            ({"logit_scale": 3.0, "logits_scaling": 2.0, "final_logit_softcapping": 30.0}, 1.5, 30.0),
            ({"logit_scale": None, "logits_scaling": None, "final_logit_softcapping": None}, 1.0, None),
        ],
        ids=str,
    )
    def test_configuration_gives_scale_and_soft_cap(self, options: dict, scale: float, softcap: float | None):
        module = torch.nn.Linear(4, 7)
        module.packed_weight = packed = torch.ones(1)
        whole = SimpleNamespace(get_text_config=lambda: PreTrainedConfig(**options))  # as of a model that also sees
        head = LMHead.of_projection(module, whole)
        assert (head.scale, head.softcap) == (scale, softcap)
        assert (head.weight, head.bias, head.packed) == (module.weight, module.bias, packed)


class TestAdaptersOnTheHead:
    def lora(self, **options) -> torch.nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_alpha=3, **options)
        return get_peft_model(build_model("llama", 40), config)

    def test_active_adapters_are_added_to_the_weight(self):
        model = self.lora()
        model.add_adapter("second", LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
        model.add_adapter("elsewhere", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        module = model.get_output_embeddings()

        def added(name: str) -> torch.Tensor:
            return module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight

        for active in (["default"], ["second"], ["default", "second"], ["default", "elsewhere"], ["elsewhere"]):
            model.base_model.set_adapter(active)
            expected = module.base_layer.weight + sum(added(name) for name in active if name != "elsewhere")
            torch.testing.assert_close(LMHead.of(model.get_base_model()).weight, expected)
        with model.disable_adapter():
            assert LMHead.of(model.get_base_model()).weight is module.base_layer.weight

    @pytest.mark.parametrize(
        "config",
        [
            IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
            LoraConfig(target_modules=["lm_head"], use_dora=True),
        ],
        ids=["IA3", "DoRA"],
    )
    def test_adapters_that_are_not_added_to_the_weight_are_refused(self, config: PeftConfig):
        model = get_peft_model(build_model("llama", 40), config)
        with pytest.raises(UserError, match=r"The adapter 'default' on the LM head \(Linear\) is not supported"):
            LMHead.of(model.get_base_model())
        with model.disable_adapter():
            assert LMHead.of(model.get_base_model()).weight is model.get_output_embeddings().base_layer.weight

    def test_own_copy_is_that_of_the_active_adapter(self):
        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        model = get_peft_model(build_model("llama", 40), LoraConfig(**options))
        model.add_adapter("second", LoraConfig(**options))
        copies = model.get_output_embeddings().modules_to_save
        for name in ("second", "default"):
            model.set_adapter(name)
            assert LMHead.of(model).weight is copies[name].weight

    def test_adapter_with_virtual_tokens_is_refused(self):
        model = get_peft_model(build_model("gpt2"), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(UserError, match=r"PromptTuningConfig \(.*\) is not supported: it adds virtual tokens"):
            without_wrapper(model)

    def test_wrapper_is_taken_off(self):
        plain = build_model("llama", 40)
        assert without_wrapper(plain) is plain
        assert without_wrapper(get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))) is plain
        linear = torch.nn.Linear(1, 1)
        assert without_wrapper(linear) is linear


class TestBody:
    @pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_states_are_those_of_each_row_without_padding(self, family: str, wrapped: bool):
        model = build_model(family, 40)
        if wrapped:
            target = {"gpt2": "c_attn", "llama": "q_proj", "bloom": "query_key_value"}[family]
            model = get_peft_model(
                model, LoraConfig(target_modules=[target], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
            ).eval()
        ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[False, False, True, True, True, True, True], [True] * 6 + [False]])
        with torch.no_grad():
            found = completion_hidden_states(model, ids, mask, 3)
            for row, real in enumerate(mask):
                alone = model(ids[row : row + 1, real], output_hidden_states=True).hidden_states[-1][0]
                states = torch.zeros(7, alone.shape[-1]).masked_scatter(real[:, None], alone)
                wanted = real[3:6]
                torch.testing.assert_close(found[row][wanted], states[3:6][wanted], rtol=1e-4, atol=1e-5)
        assert found.shape == (2, 3, 32)

    def test_pass_keeps_no_cache(self):
        model, caches = build_model("llama", 40), []
        model.base_model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
        completion_hidden_states(model, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), 2)
        assert caches == [None]

    def test_positions_of_a_row_of_padding_are_zero(self):
        assert position_ids(torch.tensor([[False, False], [False, True]])).tolist() == [[0, 0], [0, 0]]

    def test_highest_token_must_have_an_embedding(self):
        model = build_model("gpt2", 40)
        check_embedded(model, [[0, 39], []])
        check_embedded(model, [])
        with pytest.raises(UserError, match=r"the token 40 in a prompt.* the model has 40 embeddings only"):
            check_embedded(model, [[1], [40, 2]])


class TestCheck:
    def test_tolerance_is_that_of_the_roundings_and_at_least_that_of_tf32(self):
        assert rounding_tolerance(torch.bfloat16, 3) == 3 / 128
        assert rounding_tolerance(torch.float32, 12) == 1e-3
        assert rounding_tolerance(torch.float16, 2) == pytest.approx(2**-9)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(("family", "vocab_size"), [("gpt2", 5), ("gpt2", 40), ("bloom", 40)])
    def test_mode_of_the_model_stays_and_dropout_is_off(self, training: bool, family: str, vocab_size: int):
        """The input has eight tokens, more than a small vocabulary; BLOOM takes no positions."""
        model = build_model(family, vocab_size).train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        check_head(model, "student")
        assert all(module.training == training for module in model.modules())
        assert not model.get_output_embeddings()._forward_hooks

    @pytest.mark.parametrize(
        ("dtype", "factor", "is_refused"),
        [
            *((torch.float32, factor, True) for factor in (1.003, 0.997, math.nan)),
            *((torch.float32, 1.0005, False), (torch.bfloat16, 1.02, True), (torch.bfloat16, 1.008, False)),
        ],
        ids=str,
    )
    def test_logits_that_are_off_by_more_than_rounding_are_refused(self, monkeypatch, dtype, factor, is_refused: bool):
        model = build_model("llama", 40).to(dtype)
        monkeypatch.setattr(
            "minillm_trl.models.lm_head.completion_hidden_states",
            lambda *args: completion_hidden_states(*args) * factor,
        )
        message = r"LM head of the teacher \(LlamaForCausalLM\) is not reproduced"
        with pytest.raises(UserError, match=message) if is_refused else nullcontext():
            check_head(model, "teacher")

    @pytest.mark.parametrize(("family", "expected"), [("llama", True), ("bloom", False)])
    def test_models_get_positions_where_they_take_them(self, family: str, expected: bool):
        model, given = build_model(family, 40), []
        for module in (model, model.base_model):
            module.register_forward_pre_hook(lambda *call: given.append("position_ids" in call[2]), with_kwargs=True)
        check_head(model, "student")
        assert len(given) == 5  # the body alone, and twice the model and its body
        assert all(given[:2]) if expected else not any(given[:2])

    def test_head_that_is_not_here_is_refused(self):
        model = build_model("llama", 40)
        model.lm_head.to("meta")
        with pytest.raises(UserError, match=r"LM head of the student .* offloaded by its device_map"):
            check_head(model, "student")

    def test_sharded_head_is_refused(self, monkeypatch: pytest.MonkeyPatch):
        class Sharded(torch.nn.Parameter):
            """In place of a DTensor, which needs a process group."""

        monkeypatch.setattr("minillm_trl.models.lm_head.DTensor", Sharded)
        model = build_model("llama", 40)
        model.lm_head.weight = Sharded(model.lm_head.weight)
        with pytest.raises(UserError, match="sharded over processes, but each process needs all of it"):
            check_head(model, "student")
