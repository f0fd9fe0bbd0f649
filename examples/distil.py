# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "datasets>=5.2,<6",
#     "minillm-trl",
#     "transformers>=5.19,<5.25",
# ]
#
# [tool.uv.sources]
# minillm-trl = { path = ".." } # this clone
# ///
"""Distil a teacher into a student, in one file:

    uv run examples/distil.py --student STUDENT --teacher TEACHER --prompts prompts.jsonl

Models are folders or names on the hub; they need the same tokenizer. The file has a column `prompt` with at least 72
texts or conversations. A tenth of them is held out: the script measures the student on them before and after, and
prints its answers to two of them. Copy it and change what you like.
"""

import argparse

from datasets import load_dataset
from transformers import pipeline

from minillm_trl import MiniLLMConfig, MiniLLMTrainer

MEASURES = {
    "reverse KL per token": "eval_objective/reverse_kl_per_token",
    "mean length": "eval_completions/mean_length",
    "share that ends": "eval_rollout/eos_rate",
    "repeated 4-grams": "eval_rollout/repeated_4grams",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder or name on the hub, fine-tuned on the task")
    parser.add_argument("--teacher", required=True, help="folder or name on the hub")
    parser.add_argument("--prompts", required=True, help="JSON lines with a column `prompt`")
    parser.add_argument("--output_dir", default="runs/distil")
    parser.add_argument("--max_completion_length", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=256, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=5e-6, help="(default: %(default)s)")
    options = parser.parse_args()

    prompts = load_dataset("json", data_files=options.prompts, split="train").train_test_split(0.1, seed=0)
    args = MiniLLMConfig(
        options.output_dir,
        max_completion_length=options.max_completion_length,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        # 64 rollouts, and four passes over them in mini-batches of 16
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_iterations=4,
        logging_steps=16,
        save_strategy="no",
        report_to="none",
    )
    trainer = MiniLLMTrainer(
        options.student,
        options.teacher,
        args=args,
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()

    for title, name in MEASURES.items():
        print(f"{title:<22}{before[name]:9.3f} -> {after[name]:.3f}")
    held_out = prompts["test"]["prompt"][:2]
    limit = options.max_completion_length
    for title, folder in (("before", options.student), ("after", options.output_dir)):
        write = pipeline("text-generation", model=folder)
        for prompt in held_out:
            (answer,) = write(prompt, max_new_tokens=limit, do_sample=False, return_full_text=False)
            print(f"{title}: {answer['generated_text']!r}")


if __name__ == "__main__":
    main()
