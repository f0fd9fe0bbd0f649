"""Packed weights compute the same products, in the layers that can be packed, and leave no trace."""

import json
import logging
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minillm_trl.models import packed_weights as module_under_test
from minillm_trl.models.fused_head import ScoreRequest, add_scoring, score_hidden_states
from minillm_trl.models.lm_head import LMHead
from minillm_trl.models.packed_weights import multiply, packed_weights, packs_weights
from minillm_trl.rollouts.compiled_steps import CompiledDecoding, Reader
from minillm_trl.rollouts.sampling import sample_completions, sample_prompts

pytestmark = pytest.mark.skipif(not packs_weights(), reason="packs weights on x86 CPUs only")

IDS = torch.arange(20).view(2, 10)


def make_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":  # Conv1D with biases, which start at 0
        model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=192, n_layer=2, n_head=2)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    if kind == "head with a bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(600))
    return model


def packed_modules(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "packed_weight")]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "head with a bias"])
def test_logits_are_equal_within_rounding(kind):
    model = make_model(kind)
    with torch.no_grad():
        expected, states = model(IDS).logits, model.base_model(IDS).last_hidden_state
        with packed_weights([model], tokens=16):
            assert "lm_head" in packed_modules(model)
            found, head = model(IDS).logits, LMHead.of(model)
            assert head.packed is not None
            of_head = head.logits(states, 500)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_head, expected[..., :500], rtol=1e-4, atol=1e-5)


def test_packed_layers_multiply_with_onednn(monkeypatch):
    model, shapes = make_model("llama"), []

    def noting(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append(tuple(states.shape))
        return multiply(states, weight, bias)

    monkeypatch.setattr(module_under_test, "multiply", noting)
    with torch.no_grad(), packed_weights([model], tokens=16):
        layers = len(packed_modules(model))
        model(IDS)
        assert len(shapes) == layers > 1
        assert model.model.layers[0].mlp.up_proj(torch.ones(0, 160)).shape == (0, 512)
    assert len(shapes) == layers


def test_small_layers_and_other_precisions_stay_as_they_are():
    model = make_model("llama")
    with packed_weights([model], tokens=16):
        names = packed_modules(model)
    assert any("mlp" in name for name in names)
    assert not any("k_proj" in name for name in names)  # 80 x 160
    with packed_weights([model], tokens=15):
        assert packed_modules(model) == []
    with packed_weights([model.bfloat16()], tokens=16):
        assert packed_modules(model) == []


def test_weight_of_two_layers_is_packed_once():
    """A teacher on the student's base has layers of its own around the same weights."""
    first, second = make_model("llama"), make_model("llama")
    second.lm_head.weight = first.lm_head.weight
    with packed_weights([first, second], tokens=16):
        assert first.lm_head.packed_weight is second.lm_head.packed_weight
        layers = [model.model.layers[0].mlp.up_proj for model in (first, second)]
        assert layers[0].packed_weight is not layers[1].packed_weight


def test_gradients_and_autocast_use_the_weights_themselves():
    model = make_model("llama")
    expected = torch.autograd.grad(model(IDS).logits.square().sum(), model.lm_head.weight)[0]
    with packed_weights([model], tokens=16):
        found = torch.autograd.grad(model(IDS).logits.square().sum(), model.lm_head.weight)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert model(IDS).logits.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_are_unpacked_at_the_end_even_after_an_error():
    model = make_model("gpt2")
    add_scoring(model, 600)  # replaces `forward` of the model and its head
    scored = model.lm_head.forward
    packing = packed_weights([model], tokens=16)
    packing.__enter__()
    assert model.lm_head.forward is not scored
    assert not packing.__exit__(KeyError, KeyError(), None)
    assert packed_modules(model) == []
    assert model.lm_head.forward == scored
    assert "forward" not in vars(model.transformer.h[0].mlp.c_fc)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupt_while_packing_keeps_its_type_and_unpacks(monkeypatch, error: type[BaseException]):
    model, pack, calls = make_model("llama"), module_under_test._packed, iter(range(5))

    def interrupted(module: torch.nn.Module) -> torch.Tensor:
        if next(calls) == 3:
            raise error
        return pack(module)

    monkeypatch.setattr(module_under_test, "_packed", interrupted)
    with pytest.raises(error), packed_weights([model], tokens=16):
        pass
    assert next(calls) == 4
    assert packed_modules(model) == [name for name, module in model.named_modules() if "forward" in vars(module)] == []


def test_nested_packing_ends_with_the_outer_statement():
    model, other = make_model("llama"), make_model("gpt2")
    with packed_weights([model], tokens=16):
        outer = packed_modules(model)
        with packed_weights([model, other], tokens=16):
            assert packed_modules(other)
        assert packed_modules(model) == outer != []
        assert packed_modules(other) == []
    assert packed_modules(model) == []


def test_forward_of_somebody_else_runs():
    model = make_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = types.MethodType(lambda self, states: torch.zeros(*states.shape[:-1], 512), layer)
    with torch.no_grad(), packed_weights([model], tokens=16):
        assert not layer(torch.ones(1, 160)).any()
        assert "lm_head" in packed_modules(model)


@pytest.fixture
def fresh_check() -> Iterator[None]:
    """Look at the machine again, during and after a test."""
    module_under_test._has_kernels.cache_clear()
    yield
    module_under_test._has_kernels.cache_clear()


def test_without_the_operators_products_are_plain_and_one_warning_says_so(monkeypatch, caplog, fresh_check):
    monkeypatch.setattr(module_under_test, "_OPERATORS", ("_linear_pointwise", "_no_such_operator"))
    model = make_model("llama")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            with packed_weights([model], tokens=16):
                assert packed_modules(model) == []
                model(IDS)
    assert caplog.text.count("lacks torch.ops.mkldnn._no_such_operator") == 1


def test_builds_without_onednn_and_other_processors_use_plain_products(monkeypatch, fresh_check):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packs_weights()
    monkeypatch.undo()
    module_under_test._has_kernels.cache_clear()
    monkeypatch.setattr(module_under_test.platform, "machine", lambda: "aarch64")
    assert not packs_weights()


def test_heads_with_a_weight_of_another_type_use_its_own_products():
    """A sharded or quantised weight is a subclass of a tensor, of which oneDNN's operator knows nothing."""

    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            found = super().__torch_function__(function, types, args, kwargs or {})
            return 2 * found.as_subclass(torch.Tensor) if function is torch.nn.functional.linear else found

    weight, states = torch.randn(600, 160), torch.randn(3, 160)
    with torch.no_grad():
        found = LMHead(weight.as_subclass(Doubled), None).project(states, 600)
    torch.testing.assert_close(found, 2 * states @ weight.T, rtol=1e-4, atol=1e-4)


def test_sampling_packs_the_models_that_draw(monkeypatch):
    """Not those that a sharded teacher's processes, or compiled steps, need as they are."""
    monkeypatch.setattr(Reader, "_compile", lambda reader, plan: lambda: bool(reader._run(plan)) or True)
    student, teacher = make_model("llama"), make_model("llama")
    found = set()
    for name, model in (("student", student), ("teacher", teacher)):
        model.base_model.register_forward_pre_hook(
            lambda *_, name=name: found.add((name, bool(packed_modules(student)), bool(packed_modules(teacher))))
        )

    def packed(**options) -> set[tuple[str, bool, bool]]:
        found.clear()
        common = {"keys": [(0,)], "max_new_tokens": 16, "eos_token_ids": [], "pad_token_id": 0, "teacher": teacher}
        sample_prompts(student, [[1, 2, 3]], **{**common, "alpha": 0.5, **options})
        return found

    assert packed() == {("student", True, True), ("teacher", True, True)}
    assert packed(alpha=0.0) == {("student", True, False)}
    assert packed(on_every_process=bool) == {("student", False, False), ("teacher", False, False)}
    compiled = CompiledDecoding(student, "eager")
    assert packed(compiled=compiled) == {("student", False, True), ("teacher", False, True)}
    found.clear()
    options = {"max_new_tokens": 16, "eos_token_ids": [], "pad_token_id": 0, "uniforms": None, "teacher": teacher}
    coins = np.arange(16)[None] % 2 > 0
    sample_completions(student, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), **options, teacher_coins=coins)
    assert found == {("student", True, True), ("teacher", True, True)}
    found.clear()
    sample_completions(student, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), **options)
    assert found == {("student", True, False)}


def test_samples_are_those_of_the_current_weights():
    """Weights that change between two rollouts, as in training, are packed again."""
    model = make_model("llama")
    options = {"keys": [(0,)], "max_new_tokens": 16, "eos_token_ids": [], "pad_token_id": 0, "keep_states": True}
    first = sample_prompts(model, [[1, 2, 3]], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = sample_prompts(model, [[1, 2, 3]], **options)
    with torch.backends.mkldnn.flags(enabled=False):
        assert sample_prompts(model, [[1, 2, 3]], **options) == second != first


def test_samples_do_not_depend_on_batch_and_order():
    model = make_model("llama")
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    options = {"max_new_tokens": 16, "eos_token_ids": [], "pad_token_id": 0}
    keys = [(row,) for row in range(4)]
    together = sample_prompts(model, prompts, keys=keys, **options)
    assert sample_prompts(model, prompts[::-1], keys=keys[::-1], batch_size=3, **options)[::-1] == together
    alone = [sample_prompts(model, [prompt], keys=[(row,)], **options)[0] for row, prompt in enumerate(prompts)]
    assert alone == together


def test_heads_that_are_trained_have_the_gradients_of_plain_products():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 30, 160, requires_grad=True), torch.randn(600, 160, requires_grad=True)
    ids, mask = torch.randint(600, (2, 30)), torch.ones(2, 30, dtype=torch.bool)
    request = ScoreRequest(ids, mask, mask, loss=lambda scores, _: scores.logps.square())

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = score_hidden_states(hidden, LMHead(weight, None), request, 600).loss
        return torch.autograd.grad(loss, [hidden, weight])

    found = gradients()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packs_weights()
        expected = gradients()
    assert not torch.equal(found[0], expected[0])  # other kernels, other roundings
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)


def test_page_has_the_measured_speeds():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks/results/packed_products.json").read_text())["results"]
    speeds, updates = ([result["speedup"][1] for result in results[name]] for name in ("decoding", "updates"))
    page = (root / "docs/memory_and_speed.md").read_text()
    assert f"products with packed weights are {min(speeds):.1f} to {max(speeds):.1f} times as fast" in page
    assert f"With their gradients, they are {min(updates):.2f} to {max(updates):.2f} times as fast" in page
