"""`minillm-trl kd`: word-level knowledge distillation, the KD baseline of the paper."""

from trl import ModelConfig

from ..baselines import KDConfig, KDTrainer
from .arguments import DataArguments, EarlyStoppingArguments, Parser, TeacherArguments, make_parser, parse
from .examples import load_splits
from .launch import hand_over
from .metric_names import KD, check_metric_name
from .models import (
    check_models,
    check_teacher_tokenizer,
    checkpoint_to_resume,
    load_tokenizer,
    set_model_init_kwargs,
    train_and_save,
)
from .recording import add_models, record_run
from .sft import trainer_arguments


def build_parser() -> Parser:
    """The subcommand's parser."""
    types = (DataArguments, TeacherArguments, EarlyStoppingArguments, ModelConfig, KDConfig)
    return make_parser("kd", types, __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizers before any model is loaded, train, and save to `output_dir`."""
    parser = build_parser()
    parsed, launch = parse(parser, argv)
    if launch:
        return hand_over("kd", argv, launch)
    data, teacher, stopping, model, args = parsed
    callbacks = stopping.callbacks(args)
    check_metric_name(args.metric_for_best_model, KD)
    train, evaluation = load_splits(data, args.eval_strategy.value, require_completion=True)
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    check_teacher_tokenizer(teacher.teacher_model_name_or_path, args, tokenizer, train)
    check_models([model.model_name_or_path, teacher.teacher_model_name_or_path], args)
    set_model_init_kwargs(args, model)
    with record_run("kd", argv, parser, parsed, checkpoint) as record:
        record.add_data("train", data.dataset, train)
        record.add_data("evaluation", data.eval_dataset or data.dataset, evaluation)
        add_models(record, args, model.model_name_or_path, teacher.teacher_model_name_or_path)
        trainer = KDTrainer(
            teacher_model=teacher.teacher_model_name_or_path,
            args=args,
            callbacks=[*callbacks, record],
            **trainer_arguments(model, args, tokenizer, train, evaluation),
        )
        return train_and_save(trainer, checkpoint, record)
