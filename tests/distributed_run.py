"""Trains a tiny student and saves its weights; started by test_distributed.py with one process and with two."""

import sys

import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset

from minillm_trl import MiniLLMConfig, MiniLLMTrainer


def main(output: str, accumulation: int, reduction: str) -> None:
    tokenizer = build_tokenizer()
    prompts = [f"the punter {'near the river ' * (i % 4)}{i}\n" for i in range(32)]
    args = MiniLLMConfig(
        output,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,  # one optimizer step a buffer: its order does not matter
        num_iterations=2,
        teacher_mixed_alpha=0.0,  # coins belong to a process's batch
        max_completion_length=24,
        max_steps=6,
        optim="sgd",  # Adam would hide a wrong scale
        learning_rate=0.05,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        loss_reduction=reduction,
    )
    student = build_model("gpt2", len(tokenizer))
    before = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    trainer = MiniLLMTrainer(
        student,
        build_model("gpt2", len(tokenizer), 1, width=48),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        after = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
        torch.save({"moved": after - before, "history": trainer.state.log_history}, f"{output}/result.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
