"""`minillm-trl seqkd`: sequence-level knowledge distillation: fine-tune on completions of the teacher."""

import gc
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from trl import ModelConfig

from ..baselines import SeqKDConfig
from ..data import DataError
from ..errors import UserError
from ..models.encoding import holds_conversations
from ..models.init_kwargs import parsed_kwargs
from ..training.metric_names import FINE_TUNING, check_metric_name
from .arguments import DataArguments, EarlyStoppingArguments, Parser, TeacherArguments, make_parser, parse
from .launch import hand_over
from .sft import trainer_arguments

if TYPE_CHECKING:
    from datasets import Dataset

    from ..baselines.teacher_data import Job, TeacherData


def build_parser() -> Parser:
    """Return the parser of the subcommand."""
    types = (DataArguments, TeacherArguments, EarlyStoppingArguments, ModelConfig, SeqKDConfig)
    return make_parser("seqkd", types, __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, generate missing teacher completions, fine-tune, and save to `output_dir`."""
    parser = build_parser()
    parsed, launch = parse(parser, argv)
    if launch:
        return hand_over("seqkd", argv, launch)
    return _train(argv, parser, parsed)


def _train(argv: list[str], parser: Parser, parsed: tuple[Any, ...]) -> int:
    # the trainer takes seconds to import, and `--help` does not need it
    from ..baselines import FineTuningTrainer
    from ..data import load_examples
    from ..models import loading as models
    from . import recording, training
    from .examples import distinct_prompts, load_splits

    data, teacher, stopping, model, args = parsed
    callbacks = stopping.callbacks(args)
    if data.is_streamed:
        raise UserError(
            "seqkd answers all prompts before it trains, so it does not read them as a stream. Drop dataset_streaming "
            "and streaming, or set max_train_rows."
        )
    check_metric_name(args.metric_for_best_model, FINE_TUNING)
    train, evaluation = load_splits(data, args.eval_strategy.value, require_completion=False)
    if evaluation is not None:
        _check_completions(evaluation, data.eval_source)
    checkpoint = training.checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    tokenizer = models.load_tokenizer(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    training.check_models([model.model_name_or_path, teacher.teacher_model_name_or_path], args)
    training.set_model_init_kwargs(args, model)
    prompts = distinct_prompts(train, data.source)
    with recording.record_run("seqkd", argv, parser, parsed, checkpoint) as record:
        record.add_data("prompts", data.source, prompts)
        record.add_data("evaluation", data.eval_source, evaluation)
        recording.add_models(record, args, model.model_name_or_path, {None: teacher.teacher_model_name_or_path})
        with record.timing("teacher_answers"):
            folder = generate_teacher_data(teacher.teacher_model_name_or_path, args, prompts, data.source)
        if args.generate_only:
            return 0
        answers = load_examples(folder / "train.jsonl")
        record.add_data("train", str(folder), answers)
        trainer = FineTuningTrainer(
            args=args,
            callbacks=[*callbacks, record],
            **trainer_arguments(model, args, tokenizer, answers, evaluation),
        )
        return training.train_and_save(trainer, checkpoint, record)


def generate_teacher_data(teacher: str, args: SeqKDConfig, prompts: "Dataset", source: str) -> Path:
    """Generate the completions missing in `teacher_data_dir`, on all processes, and free the teacher's memory.

    Args:
        teacher (`str`): name or folder of the teacher.
        args ([`SeqKDConfig`]): configuration.
        prompts ([`~datasets.Dataset`]): one row per prompt.
        source (`str`): name of the data, as the user gave it.
    """
    from ..baselines.seqkd import generation_settings
    from ..baselines.teacher_data import TeacherData

    state = PartialState()
    assert args.teacher_data_dir is not None  # SeqKDConfig sets a default
    data = TeacherData(Path(args.teacher_data_dir), generation_settings(teacher, args, prompts))
    found, finished_with = data.read(), data.finished_with
    state.wait_for_everyone()  # all processes read the folder before one of them writes
    if len(found) == len(prompts) * args.num_generations:
        state.print(f"{data.folder}: has all completions of the teacher already.")
    else:
        _generate_missing(data, found, teacher, args, prompts, source)
        state.wait_for_everyone()
    if finished_with != args.keep_unfinished and state.is_main_process:
        statistics = data.finish(prompts, args.keep_unfinished)
        print(f"{statistics['kept']} of {statistics['completions']} completions to learn from, in {data.folder}")
    state.wait_for_everyone()
    return data.folder


def _generate_missing(
    data: "TeacherData",
    found: "Collection[Job]",
    teacher: str,
    args: SeqKDConfig,
    prompts: "Dataset",
    source: str,
) -> None:
    from ..baselines.seqkd import generate, sample_with_transformers, sample_with_vllm
    from ..models.loading import check_room, load_tokenizer
    from ..models.teacher import load_teacher, place_teacher, whole_weights

    state = PartialState()
    teacher_kwargs, template_kwargs = map(parsed_kwargs, (args.teacher_model_init_kwargs, args.chat_template_kwargs))
    revision = (teacher_kwargs or {}).get("revision")
    tokenizer = load_tokenizer(teacher, revision, args.trust_remote_code)
    length, conversational = args.max_completion_length, holds_conversations(prompts)
    check_room(
        [teacher],
        [(source, prompts)],
        tokenizer,
        "max_completion_length",
        length,
        args.trust_remote_code,
        template_kwargs,
    )
    if args.use_vllm:
        sample = sample_with_vllm(teacher, tokenizer, args, conversational=conversational)
    else:
        dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
        with whole_weights(args.deepspeed_plugin):
            loaded = load_teacher(teacher, teacher_kwargs, dtype, args.trust_remote_code, args.allow_pickled_weights)
        sample = sample_with_transformers(place_teacher(loaded, args.device), tokenizer, args, conversational)
        del loaded
    generate(
        data,
        found,
        prompts,
        tokenizer,
        sample,
        args.num_generations,
        state.process_index,
        state.num_processes,
        progress=state.is_main_process and not args.disable_tqdm,
        chat_template_kwargs=template_kwargs,
    )
    del sample
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_completions(evaluation: "Dataset", source: str) -> None:
    """Check that evaluation rows have completions: the teacher answers only training prompts."""
    completions = evaluation["completion"][:] if "completion" in evaluation.column_names else [None]
    if None in completions:
        raise DataError(
            f"{source}: row {completions.index(None)} (counting from 0) has no completion, which validation needs. "
            "Fill it in or drop the row, or leave the evaluation out."
        )
