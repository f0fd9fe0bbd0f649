"""A training run on fixed rollouts of very different lengths, for comparing trajectories."""

import torch
import torch.distributed as dist
from conftest import build_model, build_tokenizer
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from minillm_trl import MiniLLMConfig, MiniLLMTrainer

PROMPTS = [f"the punter {'near the river ' * (i % 3)}{i}\n" for i in range(48)]
CORPUS = Dataset.from_dict(
    {
        "prompt": [f"the mill {i}" for i in range(20)],
        "completion": [" is a cheap pub" * (1 + i % 5) for i in range(20)],
    }
)


def fixed_completion(prompt: str) -> list[int]:
    """Tokens that depend on the prompt alone: 1 to 24 of them, the last one the end of sequence."""
    number = PROMPTS.index(prompt)
    length = (1, 24, 3, 17, 2, 9)[number % 6]
    return [2 + (7 * number + 13 * t) % 200 for t in range(length - 1)] + [0]


def rollout(prompts: list[str], trainer: MiniLLMTrainer) -> dict:
    tokenizer = trainer.processing_class
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": [fixed_completion(prompt) for prompt in prompts],
        "logprobs": None,
    }


def late(prompts: list[str], **kwargs) -> list[float]:
    """A reward that differs much between the processes' parts of the buffer."""
    return [float(PROMPTS.index(prompt)) for prompt in prompts]


def shard_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """Spread the weights of a GPT-2's blocks over the processes of the job."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        # each block is a root of its own here, and by default roots keep their weights once gathered
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return model


def train(output: str, batch_size: int, accumulation: int, shard_teacher: bool = False, **options) -> dict:
    """Train a few steps on a buffer of three optimizer steps; returns the change of the weights and the logs.

    With `teacher_mixed_alpha` the rollouts are sampled and not the fixed ones.
    """
    tokenizer = build_tokenizer()
    args = MiniLLMConfig(
        output,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=3 * accumulation,
        max_completion_length=24,
        optim="sgd",  # Adam would hide a wrong scale
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # clipping would hide it too
        logging_steps=1,
        save_strategy="no",
        lm_batch_size=batch_size,
        **{"max_steps": 5, "teacher_mixed_alpha": 0.0, **options},
    )
    reward_funcs = late if options.get("scale_rewards") else None
    student = build_model("gpt2", len(tokenizer))
    teacher = build_model("gpt2", len(tokenizer), 1, width=48)
    before = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    trainer = MiniLLMTrainer(
        student,
        shard_blocks(teacher) if shard_teacher else teacher,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        rollout_func=None if args.teacher_mixed_alpha else rollout,
        lm_dataset=CORPUS,
    )
    trainer.train()
    after = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    return {"moved": after - before, "history": trainer.state.log_history, "main": trainer.accelerator.is_main_process}
