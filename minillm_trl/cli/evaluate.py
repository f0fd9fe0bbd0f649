"""`minillm-trl evaluate`: measure a model on prompts with references."""

import argparse
import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data import DataError
from ..errors import UserError
from ..evaluation.parts import Parts
from ..evaluation.report import format_cell
from ..evaluation.tasks import NAMED_TASKS, find_tasks
from .arguments import PlainParser, parse_with_config
from .chat import add_chat_options, as_conversations, chat_options, check_chat
from .launch import hand_over
from .task_results import is_done, weight_files, write_results

# Functions import torch, transformers and datasets, which take seconds, so that `--help` is quick.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.evaluate import Evaluation

PAPER_SEEDS = (10, 20, 30, 40, 50)
# Options that sampled results depend on
_SAMPLING = (
    *("seeds", "greedy", "temperature", "no_repeat_ngram_size", "max_new_tokens"),
    *("forward_kl", "exposure_bias_samples"),
)
_DIGITS = {"rouge_l": 2, "exact_match": 2, "length": 1, "reverse_kl": 2, "forward_kl": 2}


def build_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = PlainParser(
        "evaluate",
        description="Sample completions as the paper does (temperature 1, five seeds, no repeated 6-grams as in its "
        "code) and measure Rouge-L, exact match, loss, length, repetition, diversity and, with a teacher, divergence: "
        "means over prompts with 95 % intervals. Tasks with results in output_dir are skipped.",
        epilog="`--num_processes N` and the other options of `accelerate launch` hand the command over to it.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with values for any of these options")
    parser.add_argument("--model", required=True, help="name or folder of a model, or of a PEFT adapter alone")
    parser.add_argument("--adapter", help="name or folder of a PEFT adapter for the model")
    parser.add_argument(
        *("--teacher", "--teacher_model_name_or_path"),
        help="name or folder of a teacher, for divergences (skipped when the model is the teacher)",
    )
    _add_data_options(parser)
    _add_measuring_options(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded together (default: 64)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for results.json and samples.jsonl")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="dtype of model and teacher (default: auto, as saved; trained models are often saved in float32)",
    )
    add_chat_options(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", "--dataset_name", help="prompts with references, see `minillm-trl sft --help`")
    source.add_argument(
        *("--tasks", "--task"),
        nargs="+",
        metavar="TASK",
        help=f"each a name ({', '.join(NAMED_TASKS)}), a dataset, or NAME=DATASET, with a folder of its name in "
        "output_dir; in YAML a list or a mapping",
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="folder with what prepare-data wrote (default: data)"
    )
    parser.add_argument("--split", default="test", help="split of the datasets (default: test)")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--completion_column", default="completion")
    parser.add_argument("--references_column", default="references")
    parser.add_argument("--max_rows", type=int, help="use the first prompts only")


def _add_measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", help="sampling seeds (default: 10 20 30 40 50)")
    parser.add_argument("--greedy", action="store_true", help="decode greedily, once, instead of sampling")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument(
        "--no_repeat_ngram_size",
        type=int,
        default=6,
        help="block n-grams of this size that occur earlier in prompt or completion; 0 blocks none (default: 6, as in "
        "the paper's code)",
    )
    parser.add_argument("--forward_kl", action="store_true", help="sample from the teacher too, for forward KL")
    parser.add_argument(
        "--exposure_bias_samples",
        type=int,
        default=0,
        help="samples of model and teacher per prompt, for exposure bias (default: 0, not measured; the paper: 10)",
    )
    parser.add_argument(
        "--label_words",
        nargs="+",
        metavar="WORD",
        help="classify instead of sampling: accuracy and calibration over these words, which are the completions. "
        "Include the leading space (' positive') if prompts end without one",
    )


def run(argv: list[str]) -> int:
    """Parse the arguments, sample from the model alone, and write `results.json` and `samples.jsonl` of each task."""
    arguments, launch = parse_with_config(build_parser(), argv)
    if launch:
        return hand_over("evaluate", argv, launch)
    _check(arguments)
    from ..hardware.processes import connected_state

    state = connected_state()
    # folder and dataset of each task; all are read before a model is loaded
    sources = {arguments.output_dir: arguments.dataset}
    if arguments.tasks is not None:
        found = find_tasks(arguments.tasks, arguments.data_dir)
        sources = {arguments.output_dir / name: dataset for name, dataset in found.items()}
    prompts = {folder: _load(arguments, dataset) for folder, dataset in sources.items()}
    settings = {folder: _settings(arguments, sources[folder], prompts[folder]) for folder in sources}
    todo = [
        folder
        for folder, dataset in sources.items()
        if not is_done(folder, settings[folder], _files(arguments, dataset))
    ]
    if not todo:
        return 0
    parts = {folder: Parts(folder / "unfinished", settings[folder]) for folder in todo}
    state.wait_for_everyone()  # all processes read the folders before one of them writes
    tokenizer, model, teacher = _load_models(arguments, [(sources[folder], prompts[folder]) for folder in todo])
    for folder in todo:
        evaluation = _evaluate(arguments, model, tokenizer, prompts[folder], teacher, parts[folder])
        if state.is_main_process:
            _save(folder, settings[folder], evaluation)
            parts[folder].delete()
            _print(folder, evaluation)
    return 0


def _load_models(
    arguments: argparse.Namespace, tasks: "list[tuple[str, Dataset]]"
) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, PreTrainedModel | None]":
    """Load tokenizer, model and teacher and check them against the prompts.

    The teacher is None if there is none, or if the evaluated model is the teacher.
    """
    from accelerate import PartialState

    from ..models.encoding import encode_texts
    from ..models.loading import check_room, load_model, load_tokenizer

    trust = arguments.trust_remote_code
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=trust, adapter=arguments.adapter)
    has_teacher = arguments.teacher not in (None, arguments.model)
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
    return tokenizer, load_model(arguments.model, arguments.adapter, *options), teacher


def _evaluate(
    arguments: argparse.Namespace,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Dataset",
    teacher: "PreTrainedModel | None",
    parts: Parts,
) -> "Evaluation":
    from accelerate import PartialState

    from ..evaluation.classify import classify_model
    from ..evaluation.evaluate import evaluate_model

    if arguments.label_words is not None:
        options = {"label_words": arguments.label_words, "batch_size": arguments.batch_size}
        return classify_model(
            model, tokenizer, prompts, chat_template_kwargs=arguments.chat_template_kwargs, **options
        )
    return evaluate_model(
        model,
        tokenizer,
        prompts,
        seeds=None if arguments.greedy else arguments.seeds,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        batch_size=arguments.batch_size,
        teacher=teacher,
        forward_kl=arguments.forward_kl and teacher is not None,
        exposure_bias_samples=arguments.exposure_bias_samples if teacher is not None else 0,
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
    decoding = "greedy" if settings["greedy"] else f"seeds {', '.join(map(str, settings['seeds']))}"
    block = f"no repeated {size}-grams" if (size := settings["no_repeat_ngram_size"]) else "n-grams may repeat"
    print(f"{settings['prompts']} prompts; {decoding}; {block}; written to {folder}")


def _check(arguments: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "temperature", "batch_size"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name} must be positive, got {getattr(arguments, name)}.")
    if arguments.no_repeat_ngram_size < 0:
        raise UserError(f"--no_repeat_ngram_size must not be negative, got {arguments.no_repeat_ngram_size}.")
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise UserError(f"--max_rows must be positive, got {arguments.max_rows}.")
    if arguments.forward_kl and arguments.teacher is None:
        raise UserError("--forward_kl needs --teacher.")
    if arguments.exposure_bias_samples < 0:
        raise UserError(f"--exposure_bias_samples must not be negative, got {arguments.exposure_bias_samples}.")
    if arguments.exposure_bias_samples and arguments.teacher is None:
        raise UserError("--exposure_bias_samples needs --teacher.")
    if arguments.label_words is not None:
        _check_classification(arguments)
        return
    if arguments.greedy:
        if arguments.teacher is not None:
            raise UserError("--teacher measures divergences on samples. Drop it, or drop --greedy.")
        if arguments.seeds is not None or arguments.temperature != 1:
            raise UserError("--greedy takes the most likely tokens: --seeds and --temperature have no effect with it.")
        arguments.seeds = []
        return
    if arguments.seeds is None:
        arguments.seeds = list(PAPER_SEEDS)
    if min(arguments.seeds) < 0:
        raise UserError(f"--seeds must not be negative, got {min(arguments.seeds)}.")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds repeats a seed: {arguments.seeds}. The same seed gives the same samples.")


def _check_classification(arguments: argparse.Namespace) -> None:
    """Check the words, and refuse options of sampling, which would have no effect."""
    if len({word.strip() for word in arguments.label_words} - {""}) < max(2, len(arguments.label_words)):
        raise UserError(f"--label_words needs at least two different words, got {arguments.label_words}.")
    parser = build_parser()
    for name in (*_SAMPLING, "teacher", "eos_tokens"):
        if getattr(arguments, name) != parser.get_default(name):
            raise UserError(f"--{name} has no effect with --label_words, which samples nothing. Drop one of them.")
    arguments.seeds = []


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
        **{name: getattr(arguments, name) for name in _SAMPLING},
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
        "chat": arguments.chat or None,  # None, so that results from before this option existed still match
        **chat_options(arguments),
        "data_sha256": _digest(prompts),
    }


def _digest(prompts: "Dataset") -> str:
    """Return the SHA-256 of all prompts and references."""
    digest = hashlib.sha256()
    for row in prompts.select_columns([name for name in ("prompt", "references") if name in prompts.column_names]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _files(arguments: argparse.Namespace, dataset: str) -> list[Path]:
    """Return the local files that the results of a task depend on."""
    files = [Path(dataset)] if Path(dataset).is_file() else list(Path(dataset).glob(f"{arguments.split}.*"))
    return files + weight_files((arguments.model, arguments.adapter, arguments.teacher))


def _save(folder: Path, settings: dict[str, Any], evaluation: "Evaluation") -> None:
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
    write_results(folder, results, evaluation.samples)
