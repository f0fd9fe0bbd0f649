"""4-bit layers on CPUs for which bitsandbytes has a kernel of its own."""

from collections.abc import Callable

import bitsandbytes.nn.modules
import pytest
import torch
from conftest import build_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minillm_trl.models.bitsandbytes_layout import keep_4bit_layout
from minillm_trl.models.teacher import place_teacher


@pytest.mark.parametrize(
    "keep", [keep_4bit_layout, lambda teacher: place_teacher(teacher, torch.device("cpu"))], ids=["student", "teacher"]
)
def test_weights_are_not_repacked_in_eval_mode(tmp_path, monkeypatch, keep: Callable[[torch.nn.Module], object]):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)  # of any machine
    build_model("llama", vocab_size=50, width=16).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options).eval()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    keep(model)
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.isfinite().all()
    assert torch.equal(layer.weight.data, before)
