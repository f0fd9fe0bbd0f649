"""`minillm-trl evaluate`: measure a model on prompts with references."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..data import DataError
from ..errors import UserError
from ..evaluation.decodings import VALIDATION, is_reserved
from ..evaluation.parts import Parts
from ..evaluation.report import format_cell
from ..evaluation.tasks import find_tasks
from .arguments import parse_with_config
from .chat import as_conversations, chat_options, check_chat
from .evaluate_options import SAMPLING, build_parser, check_options
from .launch import hand_over
from .task_results import is_done, weight_files, write_results

# Functions import torch, transformers and datasets, which take seconds, so that `--help` is quick.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.evaluate import Evaluation
    from ..evaluation.task_measures import SharedMeasures

_DIGITS = {"rouge_l": 2, "exact_match": 2, "length": 1, "reverse_kl": 2, "forward_kl": 2}


class _Job(NamedTuple):
    """One evaluation of the model: its folder, dataset, prompts, arguments, and all settings it depends on."""

    folder: Path
    source: str
    prompts: "Dataset"
    arguments: argparse.Namespace
    settings: dict[str, Any]


def run(argv: list[str]) -> int:
    """Parse the arguments, sample from the model alone, and write `results.json` and `samples.jsonl` of each task."""
    arguments, launch = parse_with_config(build_parser(), argv)
    if launch:
        return hand_over("evaluate", argv, launch)
    check_options(arguments)
    from ..evaluation.task_measures import SharedMeasures
    from ..hardware.processes import connected_state

    state = connected_state()
    jobs = list(_jobs(arguments))  # all data are read before a model is loaded
    todo = [job for job in jobs if not is_done(job.folder, job.settings, _files(job))]
    if not todo:
        return 0
    parts = [Parts(job.folder / "unfinished", job.settings) for job in todo]
    state.wait_for_everyone()  # all processes read the folders before one of them writes
    tokenizer, model, teacher = _load_models(arguments, todo)
    shared: dict[int, SharedMeasures] = {}  # by dataset
    for job, job_parts in zip(todo, parts, strict=True):
        measures = shared.setdefault(id(job.prompts), SharedMeasures())
        evaluation = _evaluate(job, model, tokenizer, teacher, job_parts, measures)
        if state.is_main_process:
            _save(job, evaluation)
            job_parts.delete()
            _print(job.folder, evaluation)
    return 0


def _jobs(arguments: argparse.Namespace) -> Iterator[_Job]:
    """Yield what to evaluate: each task, on each split, with each decoding."""
    sources = {arguments.output_dir: arguments.dataset}
    if arguments.tasks is not None:
        found = find_tasks(arguments.tasks, arguments.data_dir)
        sources = {arguments.output_dir / name: dataset for name, dataset in found.items()}
    for folder, source in sources.items():
        _check_folder(folder, arguments)
        digests: list[str] = []
        for split_folder, split_arguments in _splits(folder, arguments):
            prompts = _load_split(split_arguments, source, is_validation=split_folder != folder)
            digests.append(_digest(prompts))
            if len(digests) == 2:
                _check_validation(arguments, source, prompts, digests)
            for job_folder, job_arguments in _decodings(split_folder, split_arguments):
                settings = {**_settings(job_arguments, source, prompts), "data_sha256": digests[-1]}
                yield _Job(job_folder, source, prompts, job_arguments, settings)


def _splits(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[Path, argparse.Namespace]]:
    """Yield the folder and the arguments of each split. Validation measures only what is needed to choose."""
    yield folder, arguments
    if arguments.validation_split is not None:
        validation = {"split": arguments.validation_split, "forward_kl": False, "exposure_bias_samples": 0}
        yield folder / VALIDATION, argparse.Namespace(**{**vars(arguments), **validation})


def _decodings(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[Path, argparse.Namespace]]:
    """Yield the folder and the arguments of each of `--temperatures`; without it, those given."""
    if arguments.temperatures is None:
        yield folder, argparse.Namespace(**vars(arguments), decoding=None)
    for decoding in arguments.temperatures or ():
        changes: dict[str, Any] = {"decoding": decoding.folder, "temperature": decoding.temperature}
        if decoding.temperature is None:
            changes |= {"temperature": 1.0, "greedy": True, "seeds": [], "forward_kl": False}
        if decoding.temperature != arguments.teacher_temperature:
            changes["exposure_bias_samples"] = 0  # exposure bias has one temperature for both models
        yield folder / decoding.folder, argparse.Namespace(**{**vars(arguments), **changes})


def _check_folder(folder: Path, arguments: argparse.Namespace) -> None:
    """Check that results of `--temperatures` and other results do not share a folder, where `compare` reads both."""
    if arguments.temperatures is None:
        if others := sorted(folder.glob("temperature_*/results.json")):
            raise UserError(
                f"{folder} holds results of --temperatures, such as {others[0]}. Give --temperatures, delete this "
                "folder, or name another with --output_dir."
            )
        return
    if arguments.tasks is not None and is_reserved(folder.name):
        raise UserError(
            f"--tasks {folder.name}: with --temperatures, {folder.name} is the name of a folder within a task. Choose "
            "another name with NAME=DATASET."
        )
    if (folder / "results.json").is_file():
        raise UserError(
            f"{folder} holds results without --temperatures. Delete its results.json and samples.jsonl, or name "
            "another folder with --output_dir."
        )


def _check_validation(arguments: argparse.Namespace, source: str, prompts: "Dataset", digests: list[str]) -> None:
    option = f"--validation_split {arguments.validation_split}"
    if digests[0] == digests[1]:
        raise UserError(
            f"{option}: {source} has the same prompts in this split and in --split {arguments.split}, so the "
            "temperature would be chosen on the data that is reported. Name another split, of data that has splits."
        )
    if "references" not in prompts.column_names:
        raise UserError(
            f"{option} chooses by Rouge-L, and {source} has no references in it. Add them, or leave it out."
        )


def _load_models(
    arguments: argparse.Namespace, jobs: Sequence[_Job]
) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, PreTrainedModel | None]":
    """Load tokenizer, model and teacher and check them against the prompts.

    The teacher is None if there is none, or if the evaluated model is the teacher. With `--temperatures` the evaluated
    model may be its own teacher: at other temperatures than the teacher's it diverges from it.
    """
    from accelerate import PartialState

    from ..models.encoding import encode_texts
    from ..models.loading import check_room, load_model, load_tokenizer

    trust = arguments.trust_remote_code
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=trust, adapter=arguments.adapter)
    is_teacher = arguments.teacher == arguments.model and arguments.adapter is None
    has_teacher = arguments.teacher is not None and not is_teacher
    tasks = list({id(job.prompts): (job.source, job.prompts) for job in jobs}.values())
    if has_teacher:
        _check_teacher(arguments, tokenizer, [prompts for _, prompts in tasks])
    names = [arguments.model, arguments.teacher] if has_teacher else [arguments.model]
    option, length = "max_new_tokens", arguments.max_new_tokens
    if arguments.label_words is not None:
        option, length = "label_words", max(map(len, encode_texts(tokenizer, arguments.label_words)))
    if PartialState().is_main_process:
        for _, prompts in tasks:
            check_chat(tokenizer, arguments, prompts["prompt"])
    check_room(names, tasks, tokenizer, option, length, trust, arguments.chat_template_kwargs)
    options = arguments.dtype, trust, arguments.allow_pickled_weights
    teacher = load_model(arguments.teacher, None, *options) if has_teacher else None
    model = load_model(arguments.model, arguments.adapter, *options)
    return tokenizer, model, model if is_teacher and arguments.temperatures is not None else teacher


def _evaluate(
    job: _Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel | None",
    parts: Parts,
    shared: "SharedMeasures",
) -> "Evaluation":
    from accelerate import PartialState

    from ..evaluation.classify import classify_model
    from ..evaluation.evaluate import evaluate_model

    arguments = job.arguments
    if arguments.label_words is not None:
        options = {"label_words": arguments.label_words, "batch_size": arguments.batch_size}
        return classify_model(
            model, tokenizer, job.prompts, chat_template_kwargs=arguments.chat_template_kwargs, **options
        )
    return evaluate_model(
        model,
        tokenizer,
        job.prompts,
        seeds=None if arguments.greedy else arguments.seeds,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        batch_size=arguments.batch_size,
        teacher=teacher,
        teacher_temperature=arguments.teacher_temperature,
        forward_kl=arguments.forward_kl and teacher is not None,
        loss=not arguments.no_loss,
        shared=shared,
        exposure_bias_samples=arguments.exposure_bias_samples if teacher not in (None, model) else 0,
        parts=parts,
        progress=PartialState().is_main_process,
        **chat_options(arguments),
    )


def _print(folder: Path, evaluation: "Evaluation") -> None:
    for name, interval in evaluation.summary.items():
        print(f"{name:<22} {format_cell(interval, _DIGITS.get(name, 3))}")
    if (calibration := evaluation.calibration) is not None:
        print(f"{'ece':<22} {calibration.ece:.3f} [{calibration.low:.3f}, {calibration.high:.3f}]")
        print(f"{len(evaluation.per_prompt)} prompts; written to {folder}")
        return
    settings = evaluation.settings
    seeds = ", ".join(map(str, settings["seeds"]))
    decoding = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}; seeds {seeds}"
    block = f"no repeated {size}-grams" if (size := settings["no_repeat_ngram_size"]) else "n-grams may repeat"
    print(f"{settings['prompts']} prompts; {decoding}; {block}; written to {folder}")


def _load_split(arguments: argparse.Namespace, source: str, is_validation: bool) -> "Dataset":
    try:
        return _load(arguments, source)
    except DataError as error:
        if not is_validation:
            raise
        raise DataError(
            f"--validation_split {arguments.split}: {error} Evaluate tasks without this split in a command of their "
            "own, without --validation_split; --output_dir may be the same."
        ) from error


def _load(arguments: argparse.Namespace, dataset: str) -> "Dataset":
    from ..data import load_examples
    from .examples import distinct_prompts

    examples = load_examples(
        dataset,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        references_column=arguments.references_column,
    )
    prompts = distinct_prompts(examples, dataset)
    if arguments.max_rows is not None:
        prompts = prompts.select(range(min(arguments.max_rows, len(prompts))))
    if arguments.chat:
        conversations = as_conversations(prompts["prompt"])
        prompts = prompts.remove_columns("prompt").add_column("prompt", conversations)
    _check_references(prompts, examples, dataset)
    if arguments.label_words is not None:
        from ..evaluation.classify import find_labels

        try:
            find_labels(prompts, arguments.label_words)
        except ValueError as error:
            raise DataError(f"{dataset}: {error}") from error
    return prompts


def _check_references(prompts: "Dataset", examples: "Dataset", source: str) -> None:
    if "references" not in prompts.column_names or all(prompts["references"]):
        return
    prompt = prompts["prompt"][[bool(references) for references in prompts["references"]].index(False)]
    raise DataError(
        f"{source}: row {examples['prompt'][:].index(prompt)} (counting from 0) has neither references nor a "
        "completion, so Rouge-L cannot be computed. Fill one in, drop the row, or drop both columns to skip Rouge-L."
    )


def _check_teacher(
    arguments: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", tasks: "list[Dataset]"
) -> None:
    from ..models.loading import load_tokenizer
    from ..models.teacher import check_same_tokenizer

    conversational = any(not isinstance(prompts[0]["prompt"], str) for prompts in tasks)
    teacher_tokenizer = load_tokenizer(arguments.teacher, trust_remote_code=arguments.trust_remote_code)
    check_same_tokenizer(tokenizer, teacher_tokenizer, conversational)


def _settings(arguments: argparse.Namespace, dataset: str, prompts: "Dataset") -> dict[str, Any]:
    return {
        **{name: getattr(arguments, name) for name in SAMPLING},
        "label_words": arguments.label_words,
        "prompts": len(prompts),
        "max_rows": arguments.max_rows,
        "prompt_column": arguments.prompt_column,
        "completion_column": arguments.completion_column,
        "references_column": arguments.references_column,
        "model": arguments.model,
        "adapter": arguments.adapter,
        "teacher": arguments.teacher,
        "dtype": arguments.dtype,
        "dataset": dataset,
        "split": arguments.split,
        "decoding": arguments.decoding,  # name of the folder with --temperatures, else None
        "teacher_temperature": arguments.teacher_temperature,
        # None, so that results from before these options existed still match
        "no_loss": arguments.no_loss or None,
        "chat": arguments.chat or None,
        **chat_options(arguments),
    }


def _digest(prompts: "Dataset") -> str:
    """Return the SHA-256 of all prompts and references."""
    digest = hashlib.sha256()
    for row in prompts.select_columns([name for name in ("prompt", "references") if name in prompts.column_names]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _files(job: _Job) -> list[Path]:
    """Return the local files that the results depend on."""
    arguments, source = job.arguments, Path(job.source)
    files = [source] if source.is_file() else list(source.glob(f"{arguments.split}.*"))
    return files + weight_files((arguments.model, arguments.adapter, arguments.teacher))


def _save(job: _Job, evaluation: "Evaluation") -> None:
    settings = job.settings
    exposure, calibration = evaluation.exposure_bias, evaluation.calibration
    results = {
        "settings": settings,
        "versions": {"minillm-trl": __version__, "torch": version("torch"), "transformers": version("transformers")},
        "summary": {name: interval._asdict() for name, interval in evaluation.summary.items()},
        "by_seed": evaluation.by_seed,
        "corpus": evaluation.corpus,
        "buckets": evaluation.buckets,
        "exposure_bias": exposure
        and {
            "samples": settings["exposure_bias_samples"],
            "prompts": settings["prompts"],
            **asdict(exposure),
        },
        "calibration": calibration
        and {
            **{name: getattr(calibration, name) for name in ("ece", "low", "high")},
            "bins": [bin_._asdict() for bin_ in calibration.bins],
        },
        "per_prompt": evaluation.per_prompt,
    }
    write_results(job.folder, results, evaluation.samples)
