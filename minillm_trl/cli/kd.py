"""`minillm-trl kd`: word-level knowledge distillation, the KD baseline of the paper."""

from typing import Any

from trl import ModelConfig

from ..baselines import KDConfig
from ..training.metric_names import KD, check_metric_name
from .arguments import DataArguments, EarlyStoppingArguments, Parser, TeacherArguments, make_parser, parse
from .launch import hand_over
from .sft import trainer_arguments


def build_parser() -> Parser:
    """Return the parser of the subcommand."""
    types = (DataArguments, TeacherArguments, EarlyStoppingArguments, ModelConfig, KDConfig)
    return make_parser("kd", types, __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizers before any model is loaded, train, and save to `output_dir`."""
    parser = build_parser()
    parsed, launch = parse(parser, argv)
    if launch:
        return hand_over("kd", argv, launch)
    return _train(argv, parser, parsed)


def _train(argv: list[str], parser: Parser, parsed: tuple[Any, ...]) -> int:
    # the trainer takes seconds to import, and `--help` does not need it
    from ..baselines import KDTrainer
    from ..models import loading as models
    from . import recording, training
    from .examples import check_stream_ends, load_splits

    data, teacher, stopping, model, args = parsed
    callbacks = stopping.callbacks(args)
    check_metric_name(args.metric_for_best_model, KD)
    train, evaluation = load_splits(data, args.eval_strategy.value, True, args.dataset_text_field)
    check_stream_ends(train, args.max_steps)
    checkpoint = training.checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = models.load_tokenizer(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    training.check_teacher_tokenizer(teacher.teacher_model_name_or_path, args, tokenizer, train)
    training.check_models([model.model_name_or_path, teacher.teacher_model_name_or_path], args)
    training.set_model_init_kwargs(args, model)
    with recording.record_run("kd", argv, parser, parsed, checkpoint) as record:
        record.add_data("train", data.source, train)
        record.add_data("evaluation", data.eval_source, evaluation)
        recording.add_models(record, args, model.model_name_or_path, {None: teacher.teacher_model_name_or_path})
        trainer = KDTrainer(
            teacher_model=teacher.teacher_model_name_or_path,
            args=args,
            callbacks=[*callbacks, record],
            **trainer_arguments(model, args, tokenizer, train, evaluation),
        )
        return training.train_and_save(trainer, checkpoint, record)
