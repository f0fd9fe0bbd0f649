"""`minillm-trl minillm`: distil a teacher into a student with MiniLLM."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from ..config import MiniLLMConfig
from ..errors import UserError
from ..teacher_server.addresses import served_names
from ..training.metric_names import BY_TEACHER, MINILLM, check_metric_name
from .arguments import DataArguments, EarlyStoppingArguments, Parser, make_parser, parse
from .launch import hand_over
from .presets import PresetArguments

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import TrainerCallback


@dataclass
class ServableTeacherArguments:
    """The teacher, or `teacher_server_url` for servers, `offline_teacher` for stored scores, `teachers` if several."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Name or folder of the teacher model.", "aliases": ["--teacher"]}
    )

    def check(self, args: MiniLLMConfig) -> None:
        """Check that there is one teacher.

        Raises:
            UserError: if there is none, or two.
        """
        name = self.teacher_model_name_or_path
        others = ("teacher_server_url", "offline_teacher", "teachers")
        given = [other for other in others if getattr(args, other) is not None]
        if name is None and not given:
            raise UserError(
                "--teacher_model_name_or_path is missing: name a teacher, or set --teacher_server_url, "
                "--offline_teacher or --teachers."
            )
        if name is not None and given:
            raise UserError(f"--teacher_model_name_or_path {name} and --{given[0]} are both given. Drop one of them.")

    def local(self, args: MiniLLMConfig) -> dict[str | None, str]:
        """Return the teachers that this process loads, by name; the only one of a run has the name None."""
        if self.teacher_model_name_or_path is not None:
            return {None: self.teacher_model_name_or_path}
        served = served_names(args)
        return {name: teacher for name, teacher in teachers_of(args).items() if name not in served}


def teachers_of(args: MiniLLMConfig) -> dict[str, Any]:
    """Return the teachers of `teachers`, which its `__post_init__` has parsed; nothing for a single teacher."""
    assert not isinstance(args.teachers, str)
    return args.teachers or {}


@dataclass
class CorpusArguments:
    """The corpus of the language-modelling loss (the paper's L_PT); `lm_coef` and related fields weight it."""

    lm_dataset: str | None = field(
        default=None,
        metadata={
            "help": "A .txt or .txt.gz file with one document per line, or any source of `dataset_name` with a text "
            "column or with prompts and completions. Without it there is no L_PT."
        },
    )
    lm_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    lm_dataset_split: str = field(default="train", metadata={"help": "Split of the corpus."})
    lm_text_column: str = field(default="text", metadata={"help": "Column with the text."})
    lm_streaming: bool = field(
        default=False, metadata={"help": "Read a dataset on the hub while training instead of downloading it first."}
    )
    lm_max_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})

    def load(self) -> "Dataset | IterableDataset | None":
        """Load and check the corpus, if one is named."""
        if self.lm_dataset is None:
            return None
        from ..data import load_corpus

        return load_corpus(
            self.lm_dataset,
            split=self.lm_dataset_split,
            text_column=self.lm_text_column,
            streaming=self.lm_streaming,
            max_rows=self.lm_max_rows,
            dataset_config=self.lm_dataset_config,
        )


@dataclass
class DegenerationArguments:
    """Watch for degenerate text of the student (docs/degeneration.md)."""

    on_degeneration: str = field(
        default="warn",
        metadata={
            "help": "`warn` about collapsing or growing lengths, repetition, collapsing entropy and exploding "
            "importance weights; `stop` the training too (exit status 3); or `ignore` them.",
            "choices": ["warn", "stop", "ignore"],
        },
    )

    def callbacks(self) -> "list[TrainerCallback]":
        """Return the callback that watches, or nothing for `ignore`."""
        from ..monitoring.degeneration_watch import DegenerationWatch

        return [] if self.on_degeneration == "ignore" else [DegenerationWatch(stop=self.on_degeneration == "stop")]


def build_parser() -> Parser:
    """Return the parser of the subcommand."""
    types = [PresetArguments, DataArguments, ServableTeacherArguments, CorpusArguments]
    types += [EarlyStoppingArguments, DegenerationArguments, MiniLLMConfig, ModelConfig]
    return make_parser("minillm", types, __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, check data and tokenizers before any model is loaded, train, and save to `output_dir`."""
    parser = build_parser()
    parsed, launch = parse(parser, argv)
    if launch:
        return hand_over("minillm", argv, launch)
    return _train(argv, parser, parsed)


def _train(argv: list[str], parser: Parser, parsed: tuple[Any, ...]) -> int:
    # the trainer takes seconds to import, and `--help` does not need it
    from trl import get_peft_config

    from ..models import loading as models
    from ..trainer import MiniLLMTrainer
    from ..training.data_checks import check_fills_rollout
    from ..training.teacher_choice import naming_teacher
    from . import recording, training
    from .examples import check_stream_ends, describe_repeats, distinct_prompts, load_splits

    _, data, teacher, corpus, stopping, degeneration, args, model = parsed
    teacher.check(args)
    callbacks = [*stopping.callbacks(args), *degeneration.callbacks()]
    learns_given = args.lmbda < 1.0
    by = args.teacher_column if args.teachers is not None else None
    if by is not None and data.is_streamed:
        raise UserError(
            "Streamed rows cannot be checked for their teachers before training. Drop streaming, or teachers."
        )
    rows, eval_rows = load_splits(data, args.eval_strategy.value, require_completion=False, teacher_column=by)
    source, eval_source = data.source, data.eval_source
    check_stream_ends(rows, args.max_steps)
    train = rows if data.is_streamed else distinct_prompts(rows, source, keep_completion=learns_given, by=by)
    wanted = ["prompt", *(["completion"] if learns_given else []), *([] if by is None else [by])]
    train = train.select_columns([name for name in wanted if name in next(iter(train))])
    evaluation = None if eval_rows is None else distinct_prompts(eval_rows, eval_source, by=by)
    _check_metric(args, evaluation, eval_source)
    if not data.is_streamed:
        check_fills_rollout(train, args, source, describe_repeats(rows, train))
    lm_dataset = corpus.load()
    checkpoint = training.checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    student_name, local = model.model_name_or_path, teacher.local(args)
    tokenizer = models.load_tokenizer(student_name, model.model_revision, args.trust_remote_code)
    for name, folder in local.items():  # the trainer compares the tokenizer of a server
        with naming_teacher(name):
            training.check_teacher_tokenizer(folder, args, tokenizer, train)
    # the prompts of a stream are checked while it is read
    tasks = [] if data.is_streamed else [(source, train)]
    tasks += [] if evaluation is None else [(eval_source, evaluation)]
    length, names = args.max_completion_length, [student_name, *local.values()]
    readers = names[:1] if args.cross_tokenizer else names  # of the student's tokens
    models.check_room(readers, tasks, tokenizer, "max_completion_length", length, args.trust_remote_code)
    training.check_models(names, args)
    training.set_model_init_kwargs(args, model)
    with recording.record_run("minillm", argv, parser, parsed, checkpoint) as record:
        record.add_data("train", source, train)
        record.add_data("evaluation", eval_source, evaluation)
        record.add_data("corpus", corpus.lm_dataset, lm_dataset)
        recording.add_models(record, args, student_name, local)
        trainer = MiniLLMTrainer(
            model=student_name,
            teacher_model=teacher.teacher_model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=[*callbacks, record],
            peft_config=get_peft_config(model),
            lm_dataset=lm_dataset,
            quantization_config=training.quantization_config(model, args),
        )
        record.add_clock("rollouts", lambda: trainer.rollout_seconds)
        return training.train_and_save(trainer, checkpoint, record)


def _check_metric(args: MiniLLMConfig, evaluation: "Dataset | None", source: str) -> None:
    metric = args.metric_for_best_model
    known = MINILLM | {f"{name}/{teacher}" for name in BY_TEACHER for teacher in teachers_of(args)}
    check_metric_name(metric, known if args.beta > 0 else known - {"kl"})
    if evaluation is None or metric is None or metric.removeprefix("eval_") != "rouge_l":
        return
    if "references" not in evaluation.column_names or not any(evaluation["references"]):
        raise UserError(
            f"metric_for_best_model={metric} needs references or completions, but {source} has only prompts. Add "
            "them, or choose another metric."
        )
