"""`minillm-trl sft`: supervised fine-tuning on TRL's `SFTTrainer`."""

from dataclasses import dataclass

from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..mixed_precision import choose_precision
from .arguments import DataArguments, Parser, make_parser, parse
from .examples import load_splits
from .launch import hand_over
from .models import checkpoint_to_resume, load_tokenizer


@dataclass
class FineTuningConfig(SFTConfig):
    """Configuration of `SFTTrainer`; the precision, where none is set, is chosen as for `minillm`."""

    def __post_init__(self) -> None:
        choose_precision(self)
        super().__post_init__()


def build_parser() -> Parser:
    """The subcommand's parser."""
    return make_parser("sft", (DataArguments, ModelConfig, FineTuningConfig), __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizer, train, and save to `output_dir`."""
    (data, model, args), launch = parse(build_parser(), argv)
    if launch:
        return hand_over("sft", argv, launch)
    train, evaluation = load_splits(data, args.eval_strategy.value, require_completion=True)
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train.select_columns(["prompt", "completion"]),
        eval_dataset=None if evaluation is None else evaluation.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    return 0
