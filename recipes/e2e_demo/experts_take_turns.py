"""Experts that take turns: each learns its own part from a reward, then the other parts from the other experts.

    make demo
    python recipes/e2e_demo/experts_take_turns.py
    minillm-trl minillm --config recipes/e2e_demo/minillm_several_teachers.yaml

A toy of Co-Evolving Policy Distillation (CoPD, arXiv 2604.27083) on two parts of E2E, the restaurants by the river and
all others. All experts start from one model. A round has two phases:

1. Each expert trains on the prompts of its own part with an outcome reward alone (`named_facts`, a reward function).
2. Each expert trains on the prompts of the other parts; the expert of a part, frozen after phase 1, is its teacher.

At the end, the YAML distils all experts into one student, each on the prompts of its part (multi-teacher on-policy
distillation, as in Uni-OPD, arXiv 2605.03677). What we could read of CoPD does not say how many steps a phase has, nor
which of the branches is the result; here the phases are equally long, and the experts are teachers of a new student.
"""

import argparse
from pathlib import Path

from datasets import Dataset

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.data import load_examples, unique_prompts
from minillm_trl.models.loading import load_tokenizer

PARTS = ("riverside", "elsewhere")


def part_of(prompt: str) -> str:
    """Return the part that a prompt belongs to."""
    return "riverside" if "area: riverside" in prompt else "elsewhere"


def named_facts(prompts: list[str], completions: list[str], **unused: object) -> list[float]:
    """Return the share of a prompt's names (of the place, what is near, the food) that its completion names."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        facts = dict(fact.split(": ", 1) for fact in prompt.strip().split(" | "))
        names = [facts[name] for name in ("name", "near", "food") if name in facts]
        rewards.append(sum(name in completion for name in names) / max(len(names), 1))
    return rewards


def load_parts(split: str, max_rows: int | None = None) -> Dataset:
    """Return the prompts of a split, with the part of each in the column `teacher`."""
    prompts = unique_prompts(load_examples("e2e", split=split, max_rows=max_rows))
    return prompts.add_column("teacher", [part_of(prompt) for prompt in prompts["prompt"]])


def train(
    student: str, teachers: dict[str, str], prompts: Dataset, output_dir: Path, rewarded: bool, arguments
) -> str:
    """Train a student on prompts, from their teachers or from the reward, and return the folder of its weights."""
    prompts = prompts.filter(lambda row: row["teacher"] in teachers)
    from_teachers = {"rkl_advantage": False, "teacher_mixed_alpha": 0.0}  # the exact reverse KL of each token
    from_reward = {**from_teachers, "single_step_decomposition": False, "num_generations": 4}
    trainer = MiniLLMTrainer(
        student,
        teachers,
        reward_funcs=[named_facts] if rewarded else None,
        args=MiniLLMConfig(
            str(output_dir),
            max_completion_length=arguments.max_completion_length,
            per_device_train_batch_size=arguments.batch_size,
            steps_per_generation=4,
            max_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            **(from_reward if rewarded else from_teachers),
        ),
        train_dataset=prompts,
        processing_class=load_tokenizer(student),
    )
    trainer.train()
    trainer.save_whole_model()
    return str(output_dir)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/demo/sft/model", help="model that all experts start from")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/e2e_experts"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of a phase")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--max_completion_length", type=int, default=80)
    parser.add_argument("--max_rows", type=int, help="use the first rows of the data only")
    arguments = parser.parse_args(argv)
    prompts = load_parts("train", arguments.max_rows)
    experts = dict.fromkeys(PARTS, arguments.student)
    for number in range(1, arguments.rounds + 1):
        folder = arguments.output_dir / f"round{number}"
        # the teacher of a rewarded phase is the expert as it was: its reverse KL is logged, but not trained
        experts = {
            part: train(expert, {part: expert}, prompts, folder / f"{part}_rewarded", True, arguments)
            for part, expert in experts.items()
        }
        frozen = dict(experts)
        for part in PARTS:
            others = {name: expert for name, expert in frozen.items() if name != part}
            experts[part] = train(frozen[part], others, prompts, folder / part, False, arguments)
    for split in ("train", "validation"):
        load_parts(split, arguments.max_rows).to_json(arguments.output_dir / f"data/{split}.jsonl")


if __name__ == "__main__":
    main()
