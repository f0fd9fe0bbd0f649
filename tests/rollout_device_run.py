"""Train with rollouts on a pretended device and without; tests start this in a process of its own."""

import json
import sys
from pathlib import Path
from typing import Any

import test_remote_teacher
import torch
from conftest import build_model, build_tokenizer
from peft import LoraConfig
from served import own_app, serving
from test_cross_tokenizer import save_teacher
from test_overlap import EPOCHS, LORA, SAVED, UNCHANGED
from test_reliable_runs import history
from test_trainer import DATASET, make_trainer, weights

from minillm_trl import MiniLLMTrainer
from minillm_trl.presets import preset
from minillm_trl.rollouts import speculative
from minillm_trl.training.rollout_scoring import RolloutScoring

DEVICE = "pretend:1"
EVALUATED = {"eval_dataset": DATASET.select(range(4)), "eval_strategy": "steps", "eval_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "mixed": {"num_iterations": 2, "max_steps": 12, "dataset": EPOCHS, "sampling_batch_size": 3},
    "student alone": {"teacher_mixed_alpha": 0.0, "teacher_hidden_states": "cpu", "max_completion_length": 20},
    "expected rewards": {"teacher_mixed_alpha": 0.0, "reward_estimator": "expected", "top_entropy_quantile": 0.5},
    "speculative": {"mixing": "speculative", "family": "llama", "reward_estimator": "expected", **EVALUATED},
    "half precision": {"bf16": True, "half_precision_rollouts": True, "shared_coins": False},
    "lora": {"peft_config": LORA, **EVALUATED},
    "lora, not merged": {"peft_config": UNCHANGED, "merged_rollouts": False, "beta": 0.1},
    "several teachers": {"teachers": True, "teacher_mixed_alpha": 0.3},
    "several teachers, student alone": {"teachers": True, "teacher_mixed_alpha": 0.0, "reward_estimator": "expected"},
    "another tokenizer": {**preset("cross_tokenizer"), "two_tokenizers": True, **EVALUATED},
    "adapter on the teacher's head": {"adapter_on_head": True},
    "teacher on a server": {"teacher_server_url": "a server", "teacher_server_tokens": "student"},
}


def build(folder: Path, device: str | None, options: dict[str, Any]) -> MiniLLMTrainer:
    options, teacher = {"overlap_rollouts": True, "rollout_device": device, **options}, None
    if "teacher_server_url" in options:
        return test_remote_teacher.make_trainer(folder, **{**options, "max_steps": 4})
    if options.pop("two_tokenizers", False):
        teacher = save_teacher(folder / "teacher")
    if options.pop("teachers", False):
        size = len(build_tokenizer())
        teacher = {"a": build_model("gpt2", size, 1, width=48), "b": build_model("gpt2", size, 2, width=16)}
        numbers = range(len(DATASET))
        options["dataset"] = DATASET.add_column("teacher", ["b" if number % 3 == 1 else "a" for number in numbers])
    if options.pop("adapter_on_head", False):
        base = build_model("llama", len(build_tokenizer()), 1, width=48)
        base.add_adapter(LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
        options["family"], teacher = "llama", base
    return make_trainer(folder, teacher=teacher, **options)


def devices(tensors: Any) -> set[str]:
    return {str(tensor.device) for tensor in tensors}


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def train(folder: Path, device: str | None, options: dict[str, Any], checkpoint: str | None = None) -> dict[str, Any]:
    """Train, and return weights, logs, and the devices on which parts of the run were."""
    trainer = build(folder, device, options)
    used: dict[str, set[str]] = {"sampled": set(), "scored": set()}
    sample_ahead, training_batch = RolloutScoring.sample_ahead, trainer.scoring.training_batch

    def sampled(*arguments: Any) -> Any:
        turn = sample_ahead(*arguments)
        scores = [part._replace(teacher_hidden_states=None) for _, part in turn.scores.parts]
        used["sampled"] |= devices(values for part in scores for values in part if values is not None)
        return turn

    def scored(*arguments: Any, **named: Any) -> Any:
        found = training_batch(*arguments, **named)
        used["scored"] |= devices(found.batch.values())
        return found

    RolloutScoring.sample_ahead = sampled
    trainer.scoring.training_batch = scored
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        RolloutScoring.sample_ahead = sample_ahead
    used["teachers"] = devices(tensor for model in trainer._teacher.models for tensor in tensors_of(model))
    used["copy"] = devices(tensors_of(trainer._rollout_copy.model))
    used["student"] = devices(tensors_of(trainer.model))
    return {"weights": weights(trainer), "history": history(trainer), "devices": used}


def compare(folder: Path) -> None:
    """Save the outcomes of all cases on both devices, and those of resumed runs."""
    torch.backends.mkldnn.set_flags(False)  # products and attention as on the pretended device
    torch.backends.cuda.enable_flash_sdp(False)
    speculative._TOKENS_PER_READ["pretend"] = speculative._TOKENS_PER_READ["cpu"]  # for blocks of the same length
    found = {}
    with serving(own_app(build_model("gpt2", len(build_tokenizer()), 1, width=48))) as url:
        for name, options in CASES.items():
            options = {**options, **({"teacher_server_url": url} if "teacher_server_url" in options else {})}
            devices = None, DEVICE
            found[name] = {str(device): train(folder / name / str(device), device, options) for device in devices}
    saved = {**SAVED, "max_steps": 4}
    for device, other in ((None, DEVICE), (DEVICE, None)):
        whole = train(folder / f"whole {device}", device, saved)
        checkpoint = str(folder / f"whole {device}" / "checkpoint-2")
        resumed = train(folder / f"resumed {device}", other, saved, checkpoint)
        found[f"resumed from {device}"] = {"whole": whole, "resumed": resumed}
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    import pretend_device  # noqa: F401  # registers the device in this process alone

    if len(sys.argv) == 2:
        compare(Path(sys.argv[1]))
    else:
        import distributed_run

        assert json.loads(sys.argv[4])["rollout_device"]
        distributed_run.main(*sys.argv[1:])
