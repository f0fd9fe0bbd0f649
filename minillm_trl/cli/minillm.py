"""`minillm-trl minillm`: distil a teacher into a student with MiniLLM."""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import MiniLLMConfig
from ..data import check_prompt_lengths, unique_prompts
from ..teacher import check_same_tokenizer
from ..trainer import MiniLLMTrainer
from .arguments import DataArguments, Parser, make_parser, parse
from .examples import load_splits
from .launch import hand_over
from .models import checkpoint_to_resume, load_tokenizer


@dataclass
class TeacherArguments:
    """The teacher."""

    teacher_model_name_or_path: str = field(metadata={"help": "Name or folder of the teacher model."})


def build_parser() -> Parser:
    """The subcommand's parser."""
    return make_parser("minillm", (DataArguments, TeacherArguments, MiniLLMConfig, ModelConfig), __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizers before any model is loaded, train, and save to `output_dir`."""
    (data, teacher, args, model), launch = parse(build_parser(), argv)
    if launch:
        return hand_over("minillm", argv, launch)
    train, evaluation = load_splits(data, args.eval_strategy.value, require_completion=False)
    train = unique_prompts(train).select_columns(["prompt"])
    evaluation = None if evaluation is None else unique_prompts(evaluation)
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    teacher_tokenizer = load_tokenizer(
        teacher.teacher_model_name_or_path,
        (args.teacher_model_init_kwargs or {}).get("revision"),
        args.trust_remote_code,
    )
    check_same_tokenizer(tokenizer, teacher_tokenizer, conversational=not isinstance(train[0]["prompt"], str))
    _check_lengths(
        data, args, (model.model_name_or_path, teacher.teacher_model_name_or_path), tokenizer, train, evaluation
    )
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = MiniLLMTrainer(
        model=model.model_name_or_path,
        teacher_model=teacher.teacher_model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    return 0


def _check_lengths(data, args, names, tokenizer, train: Dataset, evaluation: Dataset | None) -> None:
    configs = [
        AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code).get_text_config() for name in names
    ]
    limits = [limit for config in configs if (limit := getattr(config, "max_position_embeddings", None))]
    if not limits:
        return
    room = min(limits) - args.max_completion_length
    if room <= 0:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the models' context "
            f"of {min(limits)} tokens. Lower it."
        )
    check_prompt_lengths(train, tokenizer, max_prompt_tokens=room, source=data.dataset)
    if evaluation is not None:
        source = data.eval_dataset or data.dataset
        check_prompt_lengths(evaluation, tokenizer, max_prompt_tokens=room, source=source)
