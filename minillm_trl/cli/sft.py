"""`minillm-trl sft`: supervised fine-tuning on TRL's `SFTTrainer`."""

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..data import load_examples
from .arguments import DataArguments, make_parser, parse
from .launch import hand_over
from .models import checkpoint_to_resume, load_tokenizer


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizer, train, and save to `output_dir`."""
    parser = make_parser("sft", (DataArguments, ModelConfig, SFTConfig), __doc__)
    (data, model, args), launch = parse(parser, argv)
    if launch:
        return hand_over("sft", argv, launch)
    train = _load(data, data.dataset, data.dataset_train_split, data.max_train_rows)
    evaluation = None
    if data.dataset_eval_split is not None or data.eval_dataset is not None:
        split = data.dataset_eval_split or data.dataset_train_split
        evaluation = _load(data, data.eval_dataset or data.dataset, split, data.max_eval_rows)
    elif args.eval_strategy != "no":
        raise ValueError(f"eval_strategy={str(args.eval_strategy)!r} needs dataset_eval_split or eval_dataset.")
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path,
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


def _load(data: DataArguments, source: str, split: str, max_rows: int | None) -> Dataset:
    examples = load_examples(
        source,
        split=split,
        prompt_column=data.prompt_column,
        completion_column=data.completion_column,
        references_column=data.references_column,
        require_completion=True,
        max_rows=max_rows,
        dataset_config=data.dataset_config,
    )
    return examples.select_columns(["prompt", "completion"])
