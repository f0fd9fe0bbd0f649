"""Every value that has no meaning for MiniLLM is refused at construction, with the field's name and the fix."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_trainer import make_trainer, weights
from transformers import TrainingArguments
from trl import GRPOConfig

from minillm_trl import MiniLLMConfig
from minillm_trl.training.config_checks import REFUSED_FIELDS, RESHAPING_FIELDS

DOCS = Path(__file__).parents[2] / "docs/configuration.md"


def make(tmp_path, **options) -> MiniLLMConfig:
    return MiniLLMConfig(str(tmp_path), use_cpu=True, **options)


def test_defaults_are_the_paper_s(tmp_path):
    config = make(tmp_path)
    assert config.teacher_mixed_alpha == 0.2
    assert config.gamma == 1.0
    assert config.epsilon == 0.2
    assert config.temperature == 1.0
    assert config.length_normalization
    assert config.single_step_decomposition
    assert config.rkl_advantage
    assert config.disable_dropout
    assert type(config.num_generations) is int
    assert config.num_generations == 1
    assert not config.bf16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_mixed_alpha": 1.2}, r"teacher_mixed_alpha must lie in \[0, 1\], got 1.2"),
        ({"teacher_mixed_alpha": -0.1}, r"teacher_mixed_alpha must lie in \[0, 1\]"),
        ({"gamma": 2.0}, r"gamma must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"kd_temperature": -1.0}, "kd_temperature must be positive"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"max_completion_length": 0}, "max_completion_length must be positive"),
        ({"loss_reduction": "mean"}, "loss_reduction must be one of"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "must be a multiple of gradient_accumulation"),
        ({"beta": -0.1}, "beta must not be negative, got -0.1"),
        ({"delta": 1.1}, "delta must be above the clip range, which ends at 1.2, got 1.1"),
        ({"reward_scale": 0.0}, "reward_scale must be positive, got 0.0"),
        ({"reward_clip": -1.0}, "reward_clip must be positive"),
        ({"whiten_advantages": "rows"}, "whiten_advantages must be one of"),
        ({"importance_weighting": "exact"}, "importance_weighting must be one of"),
        ({"importance_weight_cap": 2.0}, "importance_weight_cap=2.0 has no effect with importance_weighting='token'"),
        ({"lm_coef": 0.0}, "lm_coef must be positive, got 0.0"),
        ({"lm_kd_ratio": 1.5}, r"lm_kd_ratio must lie in \[0, 1\], got 1.5"),
        ({"single_step_divergence": "kl"}, "single_step_divergence must be one of .*'kl'"),
        ({"forward_kl_share": 2.0}, r"forward_kl_share must lie in \[0, 1\], got 2.0"),
        ({"jsd_beta": -0.5}, r"jsd_beta must lie in \[0, 1\], got -0.5"),
        ({"skew_alpha": 1.0}, r"skew_alpha must lie in \[0, 1\), got 1.0"),
        ({"teacher_entropy_threshold": -1.0}, "teacher_entropy_threshold must not be negative, got -1.0"),
        ({"jsd_beta": 0.3}, "jsd_beta=0.3 has no effect with single_step_divergence='reverse_kl'"),
        (
            {"single_step_divergence": "forward_kl", "single_step_decomposition": False},
            "single_step_divergence='forward_kl' has no effect with single_step_decomposition=False",
        ),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must lie in \(0, 1\], got 0.0"),
        ({"iw_opd_gamma": -0.1}, "iw_opd_gamma must not be negative, got -0.1"),
        (
            {"horizon_start": 300, "max_completion_length": 256},
            r"horizon_start must lie in \[1, max_completion_length=256\], got 300",
        ),
        ({"horizon_steps": 10}, "horizon_steps=10 has no effect without horizon_start"),
        ({"horizon_start": 10, "horizon_steps": 0}, "horizon_steps must be at least 1, got 0"),
        (
            {"horizon_start": 10, "top_p": 0.9, "teacher_mixed_alpha": 0.0},
            "horizon_start=10 changes rollouts of our own decoding, but top_p=0.9",
        ),
        ({"skd_top_k": 0}, "skd_top_k must be at least 1, got 0"),
        ({"skd_top_k": 5}, "skd_top_k=5 trains on texts that .* rkl_advantage=True needs"),
        (
            {"skd_top_k": 5, "rkl_advantage": False, "teacher_mixed_alpha": 0.0, "shard_teacher": True},
            "skd_top_k=5 calls the teacher by the drafts of each process",
        ),
        ({"lmbda": 1.5}, r"lmbda must lie in \[0, 1\], got 1.5"),
        ({"lmbda": 0.5}, "lmbda=0.5 trains on texts that .* rkl_advantage=True needs"),
        ({"lmbda": 0.5, "rkl_advantage": False}, "teacher_mixed_alpha=0.2 needs their probabilities"),
        ({"lmbda": 0.5, "rkl_advantage": False, "teacher_mixed_alpha": 0.0, "beta": 0.1}, "beta=0.1 needs their"),
        (
            {"lmbda": 0.5, "rkl_advantage": False, "teacher_mixed_alpha": 0.0, "top_k": 5},
            "lmbda=0.5 changes rollouts of our own decoding, but top_k=5",
        ),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True would split a rollout's prompts"),
        ({"use_vllm": True}, "mixing='coins' does not work with use_vllm=True and teacher_mixed_alpha=0.2"),
    ],
)
def test_bad_value_is_refused_by_name(tmp_path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


RESHAPING = {
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "generation_kwargs": {"no_repeat_ngram_size": 3},
    "cache_implementation": "static",
}


def test_all_reshaping_fields_are_covered():
    assert RESHAPING.keys() == RESHAPING_FIELDS.keys()


@pytest.mark.parametrize(("name", "value"), RESHAPING.items())
def test_reshaped_sampling_is_refused_with_mixing_only(tmp_path, name: str, value):
    with pytest.raises(ValueError, match=f"{name}=.* reshapes the sampling distribution"):
        make(tmp_path, **{name: value})
    assert make(tmp_path, teacher_mixed_alpha=0.0, **{name: value}).reshaping_fields() == [name]


@pytest.mark.parametrize(("name", "value"), RESHAPING.items())
def test_reshaped_sampling_trains_without_mixing(tmp_path, name: str, value):
    trainer = make_trainer(tmp_path, family="llama", teacher_mixed_alpha=0.0, max_steps=2, **{name: value})
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    assert weights(trainer).isfinite().all()


REFUSED = {
    "loss_type": "grpo",
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "importance_sampling_level": "sequence",
    "entropy_coef": 0.1,
    "use_adaptive_entropy": True,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.1,
    "entropy_coef_delta": 0.1,
    "entropy_target": 0.1,
    "off_policy_mask_threshold": 0.5,
    "mask_truncated_completions": True,
    "cast_lm_head_to_fp32": True,
    "use_liger_kernel": True,
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "transformers_continuous_batching_config": {"max_memory_percent": 0.1},
    "router_aux_loss_coef": 0.1,
    "pad_to_multiple_of": 8,
    "ds3_gather_for_generation": False,
    "log_multimodal": False,
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "torch_compile": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "data_seed": 3,
    "include_num_input_tokens_seen": "all",
    "enable_jit_checkpoint": True,
}

# Fields of GRPO that work, each in one of a few runs, with another value than the default
RUNS = {
    "sampling and clipping": {
        "model_init_kwargs": {"dtype": "float32"},
        "trust_remote_code": True,
        "disable_dropout": False,
        "max_completion_length": 6,
        "temperature": 0.8,
        "shuffle_dataset": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "steps_per_generation": 3,
        "num_iterations": 2,
        "top_entropy_quantile": 0.5,
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "delta": 2.0,
        "vllm_importance_sampling_cap": 2.0,
    },
    "groups, rewards and logging": {
        "num_generations": 2,
        "num_generations_eval": 2,
        "generation_batch_size": 16,
        "reward_weights": [2.0],
        "scale_rewards": "batch",
        "multi_objective_aggregation": "normalize_then_sum",
        "max_tool_calling_iterations": 2,
        "log_completions": True,
        "num_completions_to_print": 1,
        "log_unique_prompts": True,
    },
    "reference model": {
        "beta": 0.1,
        "use_bias_correction_kl": False,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 0.5,
        "ref_model_sync_steps": 1,
    },
}
WORKING = {name: value for values in RUNS.values() for name, value in values.items()}


def test_all_refused_fields_are_covered_and_exist():
    assert REFUSED.keys() == REFUSED_FIELDS.keys()
    assert REFUSED.keys() <= {field.name for field in fields(GRPOConfig)}


def documented(heading: str) -> list[str]:
    """Names in the first column of the table under a heading of the documentation."""
    section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_documentation_gives_every_field_its_verdict():
    base, grpo, ours = (
        {field.name for field in fields(each)} for each in (TrainingArguments, GRPOConfig, MiniLLMConfig)
    )
    assert sorted(documented("MiniLLM's own")) == sorted(ours - grpo)
    # use_liger_kernel is of TrainingArguments, but acts on what GRPO replaces
    assert sorted(documented("From GRPO")) == sorted((grpo - base) | {"use_liger_kernel"})
    assert set(documented("From TrainingArguments")) <= base


def test_every_field_of_grpo_is_walked():
    own = {field.name for field in fields(GRPOConfig)} - {field.name for field in fields(TrainingArguments)}
    by_kind = [WORKING.keys(), RESHAPING.keys(), REFUSED.keys() & own]
    vllm = {name for name in own if "vllm" in name and name not in WORKING}
    hub = {"log_completions_hub_repo"}
    walked = [*(name for names in by_kind for name in names), *vllm, *hub]
    assert sorted(walked) == sorted(own)


def test_documented_refusals_are_the_refused():
    section = DOCS.read_text().split("## From GRPO\n")[1]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    refused = {
        name for names, verdict in rows if verdict.startswith(" refused") for name in re.findall(r"`(\w+)`", names)
    }
    assert refused - {"auto_find_batch_size", "parallelism_config"} == REFUSED.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("run", RUNS)
def test_working_fields_change_the_config_and_train(tmp_path, model_dir, run: str):
    options = {"per_device_eval_batch_size": 4, "max_completion_length": 4, "max_steps": 2, **RUNS[run]}
    if "reward_weights" in options:
        options["reward_funcs"] = lambda completion_ids, **kwargs: [float(ids[0]) for ids in completion_ids]
    if "generation_batch_size" in options:
        options["steps_per_generation"] = None  # the two exclude each other
    defaults = make(tmp_path)
    student = model_dir("gpt2", 0)
    trainer = make_trainer(tmp_path, student=student, teacher=model_dir("gpt2", 1, 48), **options)
    for name, value in RUNS[run].items():
        assert getattr(trainer.args, name) == value != getattr(defaults, name), name
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    assert weights(trainer).isfinite().all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_field_without_meaning_is_refused_with_a_reason(tmp_path, name: str, value):
    with pytest.raises(ValueError, match=r"is not supported by MiniLLM: .+ Leave it at"):
        make(tmp_path, **{name: value})


def test_return_includes_the_current_reward_where_the_single_step_does_not(tmp_path):
    assert not make(tmp_path).include_current_reward
    assert make(tmp_path, single_step_decomposition=False).include_current_reward
    assert make(tmp_path, include_current_reward=True).include_current_reward


def test_whitening_may_be_a_bool(tmp_path):
    assert make(tmp_path, whiten_advantages=True).whiten_advantages == "tokens"
    assert make(tmp_path, whiten_advantages=False).whiten_advantages == "none"


def test_dict_fields_are_parsed_from_json(tmp_path):
    config = make(tmp_path, teacher_model_init_kwargs='{"dtype": "float32"}')
    assert config.teacher_model_init_kwargs == {"dtype": "float32"}
