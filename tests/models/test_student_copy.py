"""The copy of the student: what it shares, what is its own, and where it is.

What it computes in half precision is in `test_rollout_scores.py`, merged adapters are in `test_merged_adapters.py`.
"""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from test_trainer import make_config

from minillm_trl.errors import UserError
from minillm_trl.models.student_copy import RolloutCopy, copy_modules, rollout_copy

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.arange(2, 9)[None]


def frozen_below(layer: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model whose weights are frozen but for its layers from `layer` on, in `dtype`."""
    model = build_model("llama").to(dtype)
    for name, weight in model.named_parameters():
        weight.requires_grad_(f"layers.{layer}." in name)
    return model


def shared_with(copied: RolloutCopy, model: torch.nn.Module) -> set[str]:
    """Return the names of the weights that the copy shares with the model."""
    return {name for name, weight in model.named_parameters() if copied.model.get_parameter(name) is weight}


class TestModules:
    def test_scales_of_quantised_weights_are_shared(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        model[1].quant_state = SimpleNamespace(absmax=torch.ones(2))
        assert copy_modules(model)[1].quant_state is model[1].quant_state

    def test_what_wrappers_put_in_the_place_of_forward_is_left_out(self):
        model = torch.nn.Linear(2, 2)
        expected = model(torch.ones(1, 2))
        model.forward = partial(pytest.fail, threading.Lock())  # a lock cannot be copied
        assert torch.equal(copy_modules(model)(torch.ones(1, 2)), expected)
        assert "forward" in vars(model)


class TestWeights:
    def test_copy_that_stays_apart_copies_what_is_trained_alone(self):
        model = frozen_below(1)
        copied = RolloutCopy(model, apart=True)
        assert shared_with(copied, model) == {
            name for name, each in model.named_parameters() if not each.requires_grad
        }
        expected = copied.model(IDS).logits
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(3.0 if weight.requires_grad else 1.0)
        assert torch.equal(copied.model(IDS).logits, expected)
        copied.refresh(model)
        assert torch.equal(copied.model(IDS).logits, model(IDS).logits)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_released_weights_come_back_whether_they_are_trained_or_not(self, dtype: torch.dtype | None):
        model = frozen_below(1)
        copied = RolloutCopy(model, dtype, sharded=True)
        expected = copied.model(IDS).logits
        copied.release()
        copied.refresh(model)
        assert torch.equal(copied.model(IDS).logits, expected)
        assert not any(weight.requires_grad for weight in copied.model.parameters())

    @pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"apart": True}, {"device": CPU}], ids=str)
    def test_weights_keep_their_address_for_compiled_code(self, options: dict):
        model = build_model("llama")
        copied = RolloutCopy(model, **options)
        places = [weight.data_ptr() for weight in copied.model.parameters()]
        with torch.no_grad():
            model.lm_head.weight.zero_()
        copied.refresh(model)
        assert [weight.data_ptr() for weight in copied.model.parameters()] == places
        assert not copied.model.lm_head.weight.any()

    @pytest.mark.parametrize("device", [None, CPU])
    def test_weights_that_are_not_in_float32_keep_their_dtype(self, device: torch.device | None):
        model = frozen_below(1, torch.float16)
        model.lm_head.float()
        copied = RolloutCopy(model, torch.bfloat16, apart=False, device=device)
        dtypes = {name: weight.dtype for name, weight in copied.model.named_parameters()}
        assert dtypes.pop("lm_head.weight") == torch.bfloat16
        assert set(dtypes.values()) == {torch.float16}
        assert shared_with(copied, model) == (set() if device else set(dtypes))

    def test_copy_follows_a_model_that_moves(self):
        """As DeepSpeed moves it, after it was copied."""
        model = build_model("llama")
        copied = RolloutCopy(model)
        copied.refresh(model.to(META))
        assert {tensor.device for tensor in [*copied.model.parameters(), *copied.model.buffers()]} == {META}


class TestChoice:
    """Whether a copy samples at all."""

    @staticmethod
    def copied(tmp_path, student: torch.nn.Module, merges: bool = True, device=None, zero_stage=None, **options):
        plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
        state = SimpleNamespace(deepspeed_plugin=plugin)
        precision = "bf16" if options.get("bf16") else "no"
        accelerator = SimpleNamespace(state=state, mixed_precision=precision)
        return rollout_copy(student, make_config(tmp_path, **options), accelerator, merges, device)

    @pytest.mark.parametrize(
        ("options", "is_merged"),
        [
            ({}, True),
            ({"merged_rollouts": True}, True),
            ({"merged_rollouts": False}, False),
            ({"merges": False}, False),
        ],
    )
    def test_adapters_are_merged_unless_they_must_not_be(self, tmp_path, options: dict, is_merged: bool):
        student = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"])).get_base_model()
        copied = self.copied(tmp_path, student, **options)
        assert (copied is not None) == is_merged
        if copied is not None:
            assert all(layer.self_attn.q_proj.merged for layer in copied.model.model.layers)

    @pytest.mark.parametrize(("zero_stage", "casts"), [(None, True), (2, False), (3, True)])
    def test_student_of_deepspeed_is_in_half_precision_already(self, tmp_path, zero_stage: int | None, casts: bool):
        options = {"bf16": True, "half_precision_rollouts": True}
        copied = self.copied(tmp_path, build_model("gpt2"), zero_stage=zero_stage, **options)
        assert (copied is not None) == casts
        if copied is not None:
            assert copied.casts
            assert copied.model.dtype == torch.bfloat16

    def test_nothing_is_copied_without_a_reason(self, tmp_path):
        assert self.copied(tmp_path, build_model("gpt2")) is None
        assert self.copied(tmp_path, build_model("gpt2"), device=CPU) is None

    def test_quantised_or_split_student_is_copied_on_its_own_devices(self, tmp_path):
        student = build_model("gpt2")
        student.scales = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        assert self.copied(tmp_path, student, overlap_rollouts=True) is not None
        with pytest.raises(UserError, match="its base is quantised"):
            self.copied(tmp_path, student, overlap_rollouts=True, device=CPU)

    @pytest.mark.parametrize(
        ("places", "is_split"), [({"": 0}, False), ({"a": 0, "b": 0}, False), ({"a": 0, "b": 1}, True)]
    )
    def test_device_map_may_name_one_device(self, tmp_path, places: dict, is_split: bool):
        student = build_model("gpt2")
        student.hf_device_map = places
        if is_split:
            with pytest.raises(UserError, match="its device_map splits it"):
                self.copied(tmp_path, student, overlap_rollouts=True, device=CPU)
        else:
            assert self.copied(tmp_path, student, overlap_rollouts=True, device=CPU) is not None
