"""`minillm-trl sft`: supervised fine-tuning of a teacher or a student."""

from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from ..baselines import FineTuningConfig
from ..errors import UserError
from ..models.encoding import holds_conversations
from ..training.metric_names import FINE_TUNING, check_metric_name
from .arguments import DataArguments, EarlyStoppingArguments, Parser, make_parser, parse
from .launch import hand_over

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


def build_parser() -> Parser:
    """Return the parser of the subcommand."""
    return make_parser("sft", (DataArguments, EarlyStoppingArguments, ModelConfig, FineTuningConfig), __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizer, train, and save to `output_dir`."""
    parser = build_parser()
    parsed, launch = parse(parser, argv)
    if launch:
        return hand_over("sft", argv, launch)
    return _train(argv, parser, parsed)


def _train(argv: list[str], parser: Parser, parsed: tuple[Any, ...]) -> int:
    # the trainer takes seconds to import, and `--help` does not need it
    from ..baselines import FineTuningTrainer
    from ..models import loading as models
    from . import recording, training
    from .examples import check_stream_ends, load_splits

    data, stopping, model, args = parsed
    callbacks = stopping.callbacks(args)
    check_metric_name(args.metric_for_best_model, FINE_TUNING)
    train, evaluation = load_splits(data, args.eval_strategy.value, True, args.dataset_text_field)
    check_stream_ends(train, args.max_steps)
    checkpoint = training.checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = models.load_tokenizer(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    training.check_models([model.model_name_or_path], args)
    training.set_model_init_kwargs(args, model)
    with recording.record_run("sft", argv, parser, parsed, checkpoint) as record:
        record.add_data("train", data.source, train)
        record.add_data("evaluation", data.eval_source, evaluation)
        recording.add_models(record, args, model.model_name_or_path)
        trainer = FineTuningTrainer(
            args=args, callbacks=[*callbacks, record], **trainer_arguments(model, args, tokenizer, train, evaluation)
        )
        return training.train_and_save(trainer, checkpoint, record)


def trainer_arguments(
    model: ModelConfig,
    args: FineTuningConfig,
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset | IterableDataset",
    evaluation: "Dataset | None",
) -> dict[str, Any]:
    """Return the arguments common to all trainers that learn from prompts and completions.

    Raises:
        ValueError: if prompts are conversations and the tokenizer has no chat template.
    """
    from trl import get_peft_config

    from .training import quantization_config

    has_template = tokenizer.chat_template is not None or args.chat_template_path is not None
    if not has_template and holds_conversations(train):
        raise UserError(
            f"--model_name_or_path {model.model_name_or_path}: the prompts are conversations, but its tokenizer has "
            "no chat template. Name one (--chat_template_path FILE.jinja), save one with the tokenizer, or write the "
            "prompts as text."
        )
    return {
        "model": model.model_name_or_path,
        "train_dataset": train.select_columns(
            ["prompt", "completion"] if "prompt" in next(iter(train)) else [args.dataset_text_field]
        ),
        "eval_dataset": evaluation,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model),
        "quantization_config": quantization_config(model, args),
    }
