"""However a step is cut into micro-batches and processes, and whatever is sharded, the outcome is the same."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_module
from fixed_rollouts import moved, train
from test_cross_tokenizer import save_teacher

from minillm_trl.presets import preset

SCRIPT = Path(__file__).parents[1].joinpath("distributed_run.py")
CASES = [
    pytest.param({"loss_reduction": "token_mean", "num_iterations": 1}, id="token mean, 1 pass"),
    pytest.param(
        {"loss_reduction": "token_mean", "num_iterations": 4, "whiten_advantages": "tokens", "max_steps": 13},
        id="token mean, 4 passes, whitened",
    ),
    pytest.param(
        {"loss_reduction": "sequence_sum", "num_iterations": 4, "lm_kd_ratio": 0.5, "scale_rewards": "batch"},
        id="sequence sum, rewards",
    ),
    pytest.param({"teacher_mixed_alpha": 0.3, "shared_coins": False, "num_iterations": 2}, id="mixed, own coins"),
    pytest.param(
        {"teacher_mixed_alpha": 0.3, "shared_coins": False, "num_iterations": 2, "several_teachers": True},
        id="mixed, several teachers",
    ),
    pytest.param({"reward_estimator": "expected", "several_teachers": True}, id="expected, several teachers"),
    pytest.param(
        {"reward_estimator": "expected", "advantage_baseline": "position", "length_normalization": False},
        id="expected rewards, baseline by position",
    ),
    pytest.param(
        {
            **{"reward_estimator": "expected", "advantage_baseline": "group", "num_generations": 4},
            **{"teacher_mixed_alpha": 0.3, "shared_coins": False, "num_iterations": 2},
        },
        id="expected rewards, baseline by group, mixed",
    ),
]


# Another tokenizer: completions are sampled, as the teacher reads their text
TWO_TOKENIZERS = {**preset("cross_tokenizer"), "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 2}

# What training has of its own under each strategy: both losses in one backward pass, activation checkpointing, inner
# passes, rollouts sampled with a teacher that is sharded or not.
EVERYTHING = {
    "teacher_mixed_alpha": 0.3,
    "shared_coins": False,
    "num_iterations": 2,
    "lm_kd_ratio": 0.5,
    "gradient_checkpointing": True,
    "whiten_advantages": "tokens",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
}
LORA = {**EVERYTHING, "lora": True}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs DeepSpeed, and a C++ compiler for its communication on CPUs",
)
STRATEGIES = [
    pytest.param("cpu", EVERYTHING | {"shard_teacher": True, "teacher": "folder"}, id="DDP, sharded teacher"),
    pytest.param("cpu", LORA, id="DDP, LoRA"),
    pytest.param("cpu", LORA | {"student": "folder", "nf4": True}, id="DDP, QLoRA"),
    pytest.param("v100_zero2_fp16", EVERYTHING, id="ZeRO-2", marks=needs_deepspeed),
    pytest.param(
        "v100_zero2_fp16", LORA | {"student": "folder", "nf4": True}, id="ZeRO-2, QLoRA", marks=needs_deepspeed
    ),
    pytest.param("zero2_bf16", LORA | {"shard_teacher": True}, id="ZeRO-2, LoRA, sharded", marks=needs_deepspeed),
    pytest.param(
        "v100_zero3_fp16",
        EVERYTHING | {"shard_teacher": True, "teacher": "folder"},
        id="ZeRO-3, sharded teacher",
        marks=needs_deepspeed,
    ),
    pytest.param(
        "zero3_bf16",
        {"gradient_checkpointing": False, "beta": 0.3, "num_iterations": 2, "student": "folder"},
        id="ZeRO-3, loaded sharded, KL to the reference",
        marks=needs_deepspeed,
    ),
    pytest.param(
        "v100_zero3_fp16", LORA | {"corpus": False, "lm_kd_ratio": 0.0}, id="ZeRO-3, LoRA", marks=needs_deepspeed
    ),
    pytest.param("v100_fsdp_fp16", EVERYTHING | {"shard_teacher": True}, id="FSDP, sharded teacher"),
    pytest.param(
        "fsdp_bf16",
        {"gradient_checkpointing": False, "beta": 0.3, "num_iterations": 2, "student": "folder"},
        id="FSDP, KL to the reference",
    ),
    pytest.param("v100_fsdp_fp16", LORA, id="FSDP, LoRA"),
]
CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate_configs"


def outcome(folder: Path, history: list[dict], lora: bool = False) -> dict:
    return {"moved": moved(str(folder), lora), "history": history}


def run(folder: Path, batch_size: int, accumulation: int, **options) -> dict:
    """The outcome on one process, this one."""
    trainer = train(str(folder), batch_size, accumulation, **options)
    return outcome(folder, trainer.state.log_history, options.get("lora", False))


def assert_same(result: dict, reference: dict) -> None:
    # float32 sums in another order; steps differ by far more (see the test below)
    assert (result["moved"] - reference["moved"]).norm() < 1e-4 * reference["moved"].norm()
    names = ("loss", "grad_norm", "objective/reverse_kl", "completions/mean_length", "rollout/eos_rate")
    names += ("objective/reverse_kl_median", "objective/long_term_signal", "objective/long_term_variance")
    names += ("objective/single_step_signal", "objective/single_step_variance")
    names += ("objective/baseline_explained_variance",)
    names += ("eval_loss", "eval_objective/reverse_kl", "eval_completions/mean_length")
    pairs = [
        (actual[name], expected[name])
        for actual, expected in zip(result["history"], reference["history"], strict=True)
        for name in names
        if name in expected
    ]
    assert pairs
    for actual, expected in pairs:
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("options", CASES)
def test_micro_batches_do_not_matter(tmp_path: Path, options: dict):
    reference = run(tmp_path, 8, 1, **options)
    for batch_size, accumulation in ((4, 2), (2, 4)):
        assert_same(run(tmp_path, batch_size, accumulation, **options), reference)


@pytest.mark.distributed
@pytest.mark.parametrize("options", CASES)
def test_processes_do_not_matter(tmp_path: Path, options: dict):
    reference = run(tmp_path, 8, 1, **options)
    assert_same(train_distributed(tmp_path, 2, 2, 2, options), reference)


def test_micro_batches_do_not_matter_to_a_teacher_with_another_tokenizer(tmp_path: Path):
    options = {**TWO_TOKENIZERS, "teacher": save_teacher(tmp_path / "teacher")}
    assert_same(run(tmp_path, 2, 4, **options), run(tmp_path, 8, 1, **options))


@pytest.mark.distributed
@pytest.mark.parametrize("shard_teacher", [False, True], ids=["whole teacher", "sharded teacher"])
def test_processes_do_not_matter_to_a_teacher_with_another_tokenizer(tmp_path: Path, shard_teacher: bool):
    options = {**TWO_TOKENIZERS, "teacher": save_teacher(tmp_path / "teacher")}
    reference = run(tmp_path, 8, 1, **options)
    result = train_distributed(tmp_path, 2, 2, 2, {**options, "shard_teacher": shard_teacher})
    assert_same(result, reference)


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "options"), STRATEGIES)
def test_strategies_reach_the_weights_of_one_process(tmp_path: Path, model_dir, config: str, options: dict):
    """Launched by the recipes' own configurations, but for their precision, which CPUs do not have."""
    folders = {"student": model_dir("gpt2"), "teacher": model_dir("gpt2", seed=1, width=48)}
    options = options | {name: folders[name] for name in folders if options.get(name) == "folder"}
    checkpoint = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    reference = run(tmp_path, 8, 1, **{**options, **checkpoint, "shard_teacher": False})
    folder = tmp_path / "distributed"
    folder.mkdir()
    command = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes=2"]
    command += ["--mixed_precision=no"]
    extra = {"fsdp_on_cpu": True} if "fsdp" in config else {}
    result = launch(command, folder, 2, 2, {**options, **checkpoint, **extra})
    expected = "FSDP" if "fsdp" in config else "DEEPSPEED" if "zero" in config else "MULTI_CPU"
    assert result["strategy"] == f"DistributedType.{expected}"
    assert_same(result, reference)
    # a checkpoint is the model as well, without what it was trained under
    assert torch.equal(moved(str(folder / "checkpoint-4"), options.get("lora", False)), result["moved"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config",
    [
        pytest.param("cpu", id="DDP"),
        pytest.param("v100_zero2_fp16", id="ZeRO-2", marks=needs_deepspeed),
        pytest.param("v100_fsdp_fp16", id="FSDP"),
    ],
)
def test_settings_of_now_are_in_force_after_a_resume(tmp_path: Path, config: str):
    """The moments are the checkpoint's, rate and weight decay are new: as on one process, and said."""
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "linear"}
    # a large epsilon, so that Adam does not enlarge the differences of rounding
    saved |= {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 0.05, "weight_decay": 0.1}
    changed = {**saved, "save_strategy": "no", "learning_rate": 0.005, "weight_decay": 0.5}
    single, distributed = tmp_path / "single", tmp_path / "distributed"
    for folder in (single, distributed):
        folder.joinpath("again").mkdir(parents=True)
    run(single, 8, 1, **saved)
    again = {**changed, "resume_from_checkpoint": str(single / "checkpoint-2")}
    reference = run(single / "again", 8, 1, **again)
    command = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes=2"]
    command += ["--mixed_precision=no"]
    extra = {"fsdp_on_cpu": True} if "fsdp" in config else {}
    launch(command, distributed, 2, 2, {**saved, **extra})
    again = {**changed, **extra, "resume_from_checkpoint": str(distributed / "checkpoint-2")}
    result = launch(command, distributed / "again", 2, 2, again)
    assert_same(result, reference)
    rates = [log["learning_rate"] for log in result["history"] if "learning_rate" in log]
    # linear from 1 to 0 in 4 steps; two of the checkpoint, two of now
    assert rates == pytest.approx([0.05, 0.0375, 0.0025, 0.00125])
    for change in ("learning_rate: 0.05 -> 0.005", "weight_decay: 0.1 -> 0.5"):
        assert result["stderr"].count(change) == 1


def test_another_order_of_rows_is_told_apart(tmp_path: Path):
    options = CASES[0].values[0]
    first, second = (run(tmp_path, 8, 1, **options, seed=seed) for seed in (0, 1))
    assert (first["moved"] - second["moved"]).norm() > 0.01 * first["moved"].norm()


def train_distributed(folder: Path, processes: int, batch_size: int, accumulation: int, options: dict) -> dict:
    command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return launch(command, folder, batch_size, accumulation, options)


def launch(command: list[str], folder: Path, batch_size: int, accumulation: int, options: dict) -> dict:
    """The outcome in the processes that a launcher starts."""
    arguments = [str(SCRIPT), str(folder), str(batch_size), str(accumulation), json.dumps(options)]
    result = run_module(*command, *arguments)
    assert result.returncode == 0, result.stderr[-5000:]
    facts = json.loads((folder / "facts.json").read_text())
    return {
        **outcome(folder, facts["history"], options.get("lora", False)),
        "strategy": facts["strategy"],
        "stderr": result.stderr,
    }
