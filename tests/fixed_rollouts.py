"""A training run on fixed rollouts of very different lengths, for comparing trajectories."""

import copy

import torch
from accelerate import DistributedType, PartialState
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minillm_trl import MiniLLMConfig, MiniLLMTrainer

PROMPTS = [f"the punter {'near the river ' * (i % 3)}{i}\n" for i in range(48)]
CORPUS = Dataset.from_dict(
    {
        "prompt": [f"the mill {i}" for i in range(20)],
        "completion": [" is a cheap pub" * (1 + i % 5) for i in range(20)],
    }
)


def fixed_completion(prompt: str) -> list[int]:
    """Return 1 to 24 tokens, with EOS last, that depend on the prompt alone."""
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
    """Return rewards that differ strongly between the processes' parts of the buffer."""
    return [float(PROMPTS.index(prompt)) for prompt in prompts]


def train(
    output: str,
    batch_size: int,
    accumulation: int,
    lora: bool = False,
    nf4: bool = False,
    student: str = "",
    teacher: str = "",
    corpus: bool = True,
    fsdp_on_cpu: bool = False,
    several_teachers: bool = False,
    resume_from_checkpoint: str | None = None,
    **options,
) -> MiniLLMTrainer:
    """Train a few steps on a buffer of three optimizer steps, and save to `output`.

    With `teacher_mixed_alpha` or `cross_tokenizer`, the rollouts are sampled instead of fixed. `student` and `teacher`
    may be folders. With `several_teachers`, a third of the rows has another teacher.
    """
    tokenizer = build_tokenizer()
    # before the configuration: under ZeRO-3, transformers shards models that are built later
    models = build_model("gpt2", len(tokenizer)), build_model("gpt2", len(tokenizer), 1, width=48)
    args = MiniLLMConfig(
        output,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=3 * accumulation,
        max_completion_length=24,
        max_grad_norm=0.0,  # clipping would hide it too
        logging_steps=1,
        lm_batch_size=batch_size if corpus else None,
        **{
            "optim": "sgd",  # Adam would hide a wrong scale
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_steps": 5,
            "teacher_mixed_alpha": 0.0,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            **options,
        },
    )
    if fsdp_on_cpu:  # accelerate allows FSDP only on GPUs; torch supports it on CPUs too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    reward_funcs = late if options.get("scale_rewards") else None
    rows, teachers = {"prompt": PROMPTS}, teacher or models[1]
    if several_teachers:
        rows["teacher"] = ["b" if number % 3 == 1 else "a" for number in range(len(PROMPTS))]
        teachers = {"a": teachers, "b": build_model("gpt2", len(tokenizer), 2, width=16)}
    trainer = MiniLLMTrainer(
        student or models[0],
        teachers,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        eval_dataset=Dataset.from_dict(rows).select(range(8)) if "eval_strategy" in options else None,
        processing_class=tokenizer,
        rollout_func=None if args.teacher_mixed_alpha or args.cross_tokenizer else rollout,
        lm_dataset=CORPUS if corpus else None,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None,
        peft_config=LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.save_model(output)
    return trainer


def moved(output: str, lora: bool = False) -> torch.Tensor:
    """Return the change of all weights as one row, from the saved model, loaded without any wrapper."""
    before = build_model("gpt2", len(build_tokenizer()))
    if lora:
        after = PeftModel.from_pretrained(copy.deepcopy(before), output).merge_and_unload()
    else:
        after = AutoModelForCausalLM.from_pretrained(output)
    names = sorted(name for name, _ in before.named_parameters())
    return torch.cat([(after.get_parameter(name) - before.get_parameter(name)).flatten() for name in names])
