"""`minillm-trl evaluate`: measure a model on prompts with references."""

import argparse
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..data import DataError, load_examples, unique_prompts
from ..evaluation.evaluate import Evaluation, evaluate_model
from ..evaluation.report import format_cell
from ..teacher import check_same_tokenizer
from .arguments import parse_with_config
from .models import check_room, load_model, load_tokenizer

_DIGITS = {"rouge_l": 2, "length": 1, "reverse_kl": 2}


def build_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="minillm-trl evaluate",
        description="Sample completions (temperature 1, nothing else shapes the distribution) and measure Rouge-L, "
        "length, end-of-sequence rate, repetition, distinct outputs and, with a teacher, reverse KL; means over "
        "prompts with 95 %% bootstrap intervals. What is in output_dir already is not computed again.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with values for any of these options")
    parser.add_argument("--model", required=True, help="name or folder of a model, or of a PEFT adapter alone")
    parser.add_argument("--adapter", help="name or folder of a PEFT adapter for the model")
    parser.add_argument("--teacher", help="name or folder of a teacher, for reverse KL (not measured of itself)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="prompts with references, see `minillm-trl sft --help`")
    source.add_argument(
        "--tasks",
        type=_task,
        nargs="+",
        metavar="NAME=DATASET",
        help="several datasets, each with a folder of its name in output_dir; in YAML a mapping",
    )
    parser.add_argument("--split", default="test", help="split of the datasets (default: test)")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--completion_column", default="completion")
    parser.add_argument("--references_column", default="references")
    parser.add_argument("--max_rows", type=int, help="use the first prompts only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="(default: 10 20 30 40 50)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded together (default: 64)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for results.json and samples.jsonl")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of model and teacher (default: auto, that of their files, which of a trained model is often float32)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, sample from the model alone, and write `results.json` and `samples.jsonl` of each task."""
    arguments = parse_with_config(build_parser(), argv)
    _check(arguments)
    # folder and dataset of each task; all are read before a model is loaded
    sources = {arguments.output_dir: arguments.dataset}
    if arguments.tasks is not None:
        sources = {arguments.output_dir / name: dataset for name, dataset in arguments.tasks}
    prompts = {folder: _load(arguments, dataset) for folder, dataset in sources.items()}
    todo = [
        folder
        for folder, dataset in sources.items()
        if not _is_done(folder, _settings(arguments, dataset, prompts[folder]), _files(arguments, dataset))
    ]
    if not todo:
        return 0
    trust = arguments.trust_remote_code
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=trust, adapter=arguments.adapter)
    has_teacher = arguments.teacher not in (None, arguments.model)
    if has_teacher:
        _check_teacher(arguments, tokenizer, [prompts[folder] for folder in todo])
    names = [arguments.model, arguments.teacher] if has_teacher else [arguments.model]
    tasks = [(sources[folder], prompts[folder]) for folder in todo]
    check_room(names, tasks, tokenizer, "max_new_tokens", arguments.max_new_tokens, trust)
    teacher = None
    if has_teacher:
        teacher = load_model(arguments.teacher, dtype=arguments.dtype, trust_remote_code=trust)
    model = load_model(arguments.model, arguments.adapter, arguments.dtype, trust)
    for folder in todo:
        evaluation = evaluate_model(
            model,
            tokenizer,
            prompts[folder],
            seeds=arguments.seeds,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            batch_size=arguments.batch_size,
            teacher=teacher,
        )
        _save(folder, _settings(arguments, sources[folder], prompts[folder]), evaluation)
        for name, interval in evaluation.summary.items():
            print(f"{name:<18} {format_cell(interval, _DIGITS.get(name, 3))}")
        print(f"{len(prompts[folder])} prompts, {len(arguments.seeds)} seeds; written to {folder}")
    return 0


def _task(text: str) -> tuple[str, str]:
    name, equals, dataset = text.partition("=")
    if not (name and equals and dataset) or Path(name).name != name:
        raise argparse.ArgumentTypeError(f"expected NAME=DATASET with a name for a folder, got {text!r}")
    return name, dataset


def _check(arguments: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "temperature", "batch_size"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(arguments, name)}.")
    if min(arguments.seeds) < 0:
        raise ValueError(f"--seeds must not be negative, got {min(arguments.seeds)}.")
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise ValueError(f"--max_rows must be positive, got {arguments.max_rows}.")
    names = [name for name, _ in arguments.tasks or ()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--tasks names {twice[0]!r} twice. Each needs a name of its own.")


def _load(arguments: argparse.Namespace, dataset: str) -> Dataset:
    examples = load_examples(
        dataset,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        references_column=arguments.references_column,
    )
    prompts = unique_prompts(examples)
    if arguments.max_rows is not None:
        prompts = prompts.select(range(min(arguments.max_rows, len(prompts))))
    _check_references(prompts, examples, dataset)
    return prompts


def _check_references(prompts: Dataset, examples: Dataset, source: str) -> None:
    if "references" not in prompts.column_names or all(prompts["references"]):
        return
    prompt = prompts["prompt"][[bool(each) for each in prompts["references"]].index(False)]
    raise DataError(
        f"{source}: row {examples['prompt'][:].index(prompt)} (counting from 0) has neither references nor a "
        "completion, so it has no Rouge-L. Fill one in, drop the row, or drop these columns to do without Rouge-L."
    )


def _check_teacher(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, tasks: list[Dataset]) -> None:
    conversational = any(not isinstance(prompts[0]["prompt"], str) for prompts in tasks)
    teacher_tokenizer = load_tokenizer(arguments.teacher, trust_remote_code=arguments.trust_remote_code)
    check_same_tokenizer(tokenizer, teacher_tokenizer, conversational)


def _settings(arguments: argparse.Namespace, dataset: str, prompts: Dataset) -> dict[str, Any]:
    return {
        "seeds": arguments.seeds,
        "temperature": arguments.temperature,
        "max_new_tokens": arguments.max_new_tokens,
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
        "data_sha256": _digest(prompts),
    }


def _digest(prompts: Dataset) -> str:
    """Of all prompts and references."""
    digest = hashlib.sha256()
    for row in prompts.select_columns([name for name in ("prompt", "references") if name in prompts.column_names]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _files(arguments: argparse.Namespace, dataset: str) -> list[Path]:
    """Local files that the results of a task come from."""
    files = [Path(dataset)] if Path(dataset).is_file() else list(Path(dataset).glob(f"{arguments.split}.*"))
    for name in filter(None, (arguments.model, arguments.adapter, arguments.teacher)):
        files += [path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin")]
    return files


def _is_done(folder: Path, settings: dict[str, Any], files: list[Path]) -> bool:
    """Whether the folder holds the results of these settings.

    Raises:
        ValueError: if it holds those of others, or its sources have been written since.
    """
    path = folder / "results.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    problems = [
        f"results of {name}={found.get(name)!r}, now {value!r}"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    problems += [
        f"results that are older than {file}" for file in files if file.stat().st_mtime_ns > path.stat().st_mtime_ns
    ]
    if problems:
        raise ValueError(f"{folder} holds {problems[0]}. Delete this folder, or name another with --output_dir.")
    print(f"{folder}: done before")
    return True


def _save(folder: Path, settings: dict[str, Any], evaluation: Evaluation) -> None:
    results = {
        "settings": settings,
        "versions": {"minillm-trl": __version__, "torch": version("torch"), "transformers": version("transformers")},
        "summary": {name: interval._asdict() for name, interval in evaluation.summary.items()},
        "per_prompt": evaluation.per_prompt,
    }
    samples = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
    folder.mkdir(parents=True, exist_ok=True)
    # results.json, which says that the task is done, comes last
    for name, text in (("samples.jsonl", samples), ("results.json", json.dumps(results, indent=1))):
        temporary = folder / f".{name}.partial"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)
