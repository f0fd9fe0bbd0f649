"""The memory estimate: its parts by hand, and the packed weights against those of sampling."""

from dataclasses import replace

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from minillm_trl.hardware.memory_estimate import (
    Workload,
    count_parameters,
    estimate_fine_tuning_memory,
    estimate_memory,
)
from minillm_trl.models.packed_weights import packed_weights, packs_weights
from minillm_trl.models.student_copy import copy_modules

LOAD = Workload(rows=8, sampled_rows=32, buffered_rows=32, prompt_tokens=256, completion_tokens=256)


def test_parameters_are_counted_without_memory():
    assert count_parameters(GPT2Config()) == 124_439_808


def test_parts_by_hand():
    student = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    teacher = GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=1000, n_positions=512)
    parts = estimate_memory(student, teacher, LOAD)
    size = count_parameters(student)
    assert parts["student, gradients and optimizer"] == 16 * size
    assert parts["teacher"] == 2 * count_parameters(teacher)
    assert parts["teacher's states of a rollout"] == 32 * 256 * 128 * 2
    assert parts["key-value caches while sampling"] == 32 * 512 * 2 * (2 * 2 * 64 + 2 * 3 * 128)
    assert parts["activations of a micro-batch"] == 8 * 512 * 64 * (4 * 2 + 34 + 15 * 4)
    sampling = parts["teacher"] + parts["key-value caches while sampling"] + parts["teacher's states of a rollout"]
    assert parts["while sampling"] == (12 + 2) * size + sampling


@pytest.mark.parametrize(("strategy", "shares"), [("ddp", 1), ("fsdp", 4)])
def test_base_of_a_lora_student_in_float32_is_copied_for_rollouts(strategy: str, shares: int):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    half = Workload(**{**vars(LOAD), "lora_rank": 4, "strategy": strategy, "processes": shares})
    wide = Workload(**{**vars(half), "base_in_float32": True})
    before, after = (estimate_memory(config, config, load) for load in (half, wide))
    size, name = count_parameters(config), "student, gradients and optimizer"
    assert after[name] - before[name] == pytest.approx(2 * size / shares)
    copied = 0 if strategy == "fsdp" else 2 * size  # FSDP's rollouts are sampled from a whole copy in any case
    assert after["copy for rollouts"] - before["copy for rollouts"] == pytest.approx(copied)


def test_merged_adapters_take_a_copy_of_the_layers_while_sampling():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    layers = count_parameters(config) - 1000 * 64  # embeddings and head are tied, and not adapted
    lora = replace(LOAD, lora_rank=4)
    cases = {
        replace(lora): 2 * layers,
        replace(lora, base_in_float32=True): 0,  # the half-precision copy becomes the merged one
        replace(lora, base_in_float32=True, half_precision_rollouts=False): 4 * layers,
        replace(lora, student_4bit=True): 0,
        replace(lora, strategy="fsdp", processes=2): 0,  # which samples from a whole copy anyway
        replace(LOAD): 0,
    }
    for load, expected in cases.items():
        without, merged = (
            estimate_memory(config, config, replace(load, merged_rollouts=merges)) for merges in (False, True)
        )
        assert merged["while sampling"] - without["while sampling"] == expected
        assert merged["while updating"] == without["while updating"]


def test_in_float32_numbers_are_twice_as_wide_and_nothing_is_copied():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    load = Workload(**{**vars(LOAD), "mixed_precision": False, "half_precision_rollouts": False})
    for checkpointing in (True, False):
        parts = estimate_memory(config, config, replace(load, gradient_checkpointing=checkpointing))
        assert parts["student, gradients and optimizer"] == 16 * count_parameters(config)
        assert parts["copy for rollouts"] == 0
        assert parts["teacher"] == 4 * count_parameters(config)
        assert parts["teacher's states of a rollout"] == 32 * 256 * 64 * 4
        assert parts["key-value caches while sampling"] == 32 * 512 * 4 * (2 * 2 * 2 * 64)
    assert parts["activations of a micro-batch"] == 2 * 8 * 512 * 64 * 2 * (34 + 8 * 4)


def test_activations_by_hand():
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2Config(intermediate_size=160, **sizes)
    layer = 8 * 512 * 64 * (20 + 7 + 8 * 2.5)
    for change, expected in (
        ({}, 8 * 512 * 64 * 3 * 4 + layer),
        ({"lora_rank": 4}, 8 * 512 * 64 * 3 * 2 + layer),
        ({"lora_rank": 4, "base_in_float32": True}, 8 * 512 * 64 * 3 * 4 + layer),
        ({"gradient_checkpointing": False}, 3 * layer),
    ):
        parts = estimate_memory(model, model, Workload(**{**vars(LOAD), **change}))
        assert parts["activations of a micro-batch"] == expected


def test_without_checkpointing_autocast_keeps_its_copies_of_the_weights():
    model = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    parts = estimate_memory(model, model, Workload(**{**vars(LOAD), "gradient_checkpointing": False}))
    assert parts["student, gradients and optimizer"] == 18 * count_parameters(model)


def test_parts_of_fine_tuning_and_kd_by_hand():
    student = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    teacher = GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=1000, n_positions=512)
    size, sharded = count_parameters(student), Workload(**{**vars(LOAD), "strategy": "fsdp", "processes": 4})
    plain = estimate_fine_tuning_memory(student, LOAD)
    assert plain["logits"] == 3 * 8 * 512 * 1000 * 4
    assert plain["while updating"] == 16 * size + plain["activations of a micro-batch"] + plain["logits"]
    assert plain["while sampling"] == 12 * size + 32 * 512 * 2 * (2 * 2 * 64)
    kd = estimate_fine_tuning_memory(student, sharded, teacher)
    assert kd["teacher"] == 2 * count_parameters(teacher)
    assert kd["while sampling"] == 3 * size + 2 * size + kd["teacher"] + 32 * 512 * 2 * (2 * 2 * 64)


@pytest.mark.skipif(not packs_weights(), reason="packs weights on x86 CPUs only")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", ["full", "lora", "shared base", "alpha 0", "lora, alpha 0", "short"])
def test_packed_weights_are_those_of_sampling(case: str, tied: bool):
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=600,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=700,
        tie_word_embeddings=tied,
    )
    student, teacher = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    if "lora" in case or case == "shared base":
        student = get_peft_model(student, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    if case == "shared base":
        teacher = copy_modules(student)
    tokens = 8 if case == "short" else 64
    load = Workload(
        **{
            **vars(LOAD),
            "completion_tokens": tokens,
            "lora_rank": 8 if isinstance(student, PeftModel) else None,
            "base_in_float32": True,
            "teacher_shares_base": case == "shared base",
            "teacher_samples": "alpha 0" not in case,
            "mixed_precision": False,
            "half_precision_rollouts": False,
            "packs_weights": True,
        }
    )
    models = [student, teacher] if load.teacher_samples else [student]
    with packed_weights(models, tokens):
        modules = [module for model in models for module in model.modules()]
        found = {
            id(module.packed_weight): module.packed_weight for module in modules if "packed_weight" in vars(module)
        }
        taken = sum(4 * weight.numel() for weight in found.values())
    assert (taken == 0) == (case == "short")
    assert estimate_memory(config, config, load).get("weights packed while sampling", 0.0) == taken


@pytest.mark.parametrize(
    "change",
    [
        {"mixed_precision": True},
        {"half_precision_rollouts": True, "teacher_samples": False},
        {"lora_rank": 8, "base_in_float32": False, "teacher_samples": False},
        {"student_4bit": True, "teacher_4bit": True},
        {"strategy": "fsdp", "processes": 2},
        {"shard_teacher": True, "processes": 2},
        {"packs_weights": False},
    ],
)
def test_no_weights_are_packed(change: dict):
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    options = {"mixed_precision": False, "half_precision_rollouts": False, "packs_weights": True}
    plain = Workload(**{**vars(LOAD), **options})
    assert estimate_memory(config, config, plain)["weights packed while sampling"] > 0.0
    assert "weights packed while sampling" not in estimate_memory(config, config, replace(plain, **change))


def test_head_of_a_lora_student_has_no_gradient_and_a_teacher_that_does_not_sample_no_cache():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    full, lora = (estimate_memory(config, config, replace(LOAD, lora_rank=rank)) for rank in (None, 4))
    assert full["heads in chunks"] - lora["heads in chunks"] == 4 * 64 * 1000
    alone, name = replace(LOAD, teacher_samples=False), "key-value caches while sampling"
    assert estimate_memory(config, config, alone)[name] == full[name] / 2


def test_embeddings_and_head_stay_in_half_precision_under_nf4():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    load = Workload(**{**vars(LOAD), "teacher_4bit": True})
    rest = count_parameters(config) - 64 * 1000
    assert estimate_memory(config, config, load)["teacher"] == pytest.approx(0.56 * rest + 2 * 64 * 1000)


def test_tensors_of_compiled_steps_have_a_power_of_two_of_columns_and_stay():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=1024)
    load, name = replace(LOAD, prompt_tokens=200), "key-value caches while sampling"
    plain, compiled = (estimate_memory(config, config, replace(load, compiles=each)) for each in (False, True))
    assert plain[name] == 32 * 456 * 2 * (2 * 2 * 64) * 2
    assert compiled[name] == 32 * 512 * 2 * (2 * 2 * 64 + 64) * 2
    assert compiled["while sampling"] - plain["while sampling"] == compiled[name] - plain[name]
    assert compiled["while updating"] - plain["while updating"] == compiled[name]
    lora = [
        estimate_memory(config, config, replace(load, lora_rank=4, merged_rollouts=True, compiles=each))
        for each in (0, 1)
    ]
    kept = lora[1][name] + lora[1]["weights merged while sampling"]
    assert lora[1]["while updating"] - lora[0]["while updating"] == pytest.approx(kept)


def test_overlapped_rollouts_take_their_memory_while_updating():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=1024)
    half, full = ({"half_precision_rollouts": each, "mixed_precision": each} for each in (True, False))
    for change in (half, full, {**full, "packs_weights": True}, {**half, "lora_rank": 4, "merged_rollouts": True}):
        turns, both = (estimate_memory(config, config, replace(LOAD, **change, overlaps=each)) for each in (0, 1))
        size = count_parameters(config) if "lora_rank" not in change else 0
        copied = 0.0 if change.get("half_precision_rollouts") else 4.0 * size
        assert both["copy for rollouts"] - turns["copy for rollouts"] == copied
        assert both["while sampling"] - turns["while sampling"] == pytest.approx(copied)
        names = ("key-value caches while sampling", "teacher's states of a rollout")
        sampling = sum(turns[name] for name in names)
        sampling += sum(turns.get(f"weights {name} while sampling", 0.0) for name in ("packed", "merged"))
        assert both["while updating"] - turns["while updating"] == pytest.approx(copied + sampling)


def test_a_device_for_rollouts_takes_what_sampling_needs():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000, n_positions=1024)
    size = count_parameters(config)
    half, full = ({"half_precision_rollouts": each, "mixed_precision": each} for each in (True, False))
    lora = {**full, "lora_rank": 4, "base_in_float32": True, "merged_rollouts": True}
    for change, copied in ((half, 2 * size), (full, 4 * size), (lora, 4 * size + 4 * 2 * 30 * 64 * 4)):
        load = replace(LOAD, **change, overlaps=True)
        one, two = (estimate_memory(config, config, replace(load, rollout_device=each)) for each in (None, "cuda:1"))
        parts = ("teacher", "key-value caches while sampling", "teacher's states of a rollout")
        assert two["copy for rollouts"] == copied
        assert two["on cuda:1, for the next rollout"] == pytest.approx(copied + sum(one[name] for name in parts))
        trains = ("student, gradients and optimizer", "activations of a micro-batch", "heads in chunks")
        head = 1000 * 64 * load.width
        assert two["while updating"] == pytest.approx(
            sum(one[name] for name in (*trains, "teacher's states of a rollout")) + head
        )
        held = two["while sampling"] - head - one["teacher's states of a rollout"]
        assert 0.0 < held < one["student, gradients and optimizer"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"lora_rank": 8}, "while updating"),
        ({"teacher_4bit": True}, "while sampling"),
        ({"keeps_teacher": False}, "while updating"),
        ({"keeps_states": False}, "while updating"),
        ({"sampled_rows": 8}, "while sampling"),
        ({"rows": 4}, "while updating"),
        ({"strategy": "zero2", "processes": 4}, "while updating"),
        ({"strategy": "fsdp", "processes": 4}, "while sampling"),
        ({"shard_teacher": True, "processes": 4}, "while sampling"),
        ({"teacher_shares_base": True}, "while sampling"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_saves_memory_lowers_the_estimate(change: dict, part: str):
    config = Qwen2Config(hidden_size=896, num_hidden_layers=4, num_attention_heads=14, num_key_value_heads=2)
    plain = estimate_memory(config, config, LOAD)
    assert estimate_memory(config, config, Workload(**{**vars(LOAD), **change}))[part] < plain[part]
