"""`minillm-trl evaluate`: measure a model on prompts with references."""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..data import load_examples, unique_prompts
from ..evaluation.evaluate import Evaluation, evaluate_model
from ..evaluation.report import format_cell
from ..teacher import check_same_tokenizer
from .arguments import parse_plain
from .models import load_model, load_tokenizer

_DIGITS = {"rouge_l": 2, "length": 1, "reverse_kl": 2}


def make_parser() -> argparse.ArgumentParser:
    """The options of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="minillm-trl evaluate",
        description="Sample completions (temperature 1, nothing else shapes the distribution) and measure Rouge-L, "
        "length, end-of-sequence rate, repetition, distinct outputs and, with a teacher, reverse KL; means over "
        "prompts with 95 %% bootstrap intervals.",
    )
    parser.add_argument("--model", required=True, help="name or folder of a model, or of a PEFT adapter alone")
    parser.add_argument("--adapter", help="name or folder of a PEFT adapter for the model")
    parser.add_argument("--teacher", help="name or folder of a teacher, for reverse KL")
    parser.add_argument("--dataset", required=True, help="prompts with references, see `minillm-trl sft --help`")
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--completion_column", default="completion")
    parser.add_argument("--references_column", default="references")
    parser.add_argument("--max_rows", type=int, help="use the first prompts only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="(default: 10 20 30 40 50)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded together (default: 64)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for results.json and samples.jsonl")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, sample from the model alone, and write `results.json` and `samples.jsonl`."""
    arguments = parse_plain(make_parser(), argv)
    for name in ("max_new_tokens", "temperature", "batch_size"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(arguments, name)}.")
    if min(arguments.seeds) < 0:
        raise ValueError(f"--seeds must not be negative, got {min(arguments.seeds)}.")
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise ValueError(f"--max_rows must be positive, got {arguments.max_rows}.")
    examples = load_examples(
        arguments.dataset,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        references_column=arguments.references_column,
    )
    prompts = unique_prompts(examples)
    if arguments.max_rows is not None:
        prompts = prompts.select(range(min(arguments.max_rows, len(prompts))))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(
        arguments.model, trust_remote_code=arguments.trust_remote_code, adapter=arguments.adapter
    )
    teacher = None
    if arguments.teacher is not None:
        conversational = not isinstance(prompts[0]["prompt"], str)
        check_same_tokenizer(
            tokenizer, load_tokenizer(arguments.teacher, trust_remote_code=arguments.trust_remote_code), conversational
        )
        teacher = load_model(arguments.teacher, trust_remote_code=arguments.trust_remote_code)
    evaluation = evaluate_model(
        load_model(arguments.model, arguments.adapter, trust_remote_code=arguments.trust_remote_code),
        tokenizer,
        prompts,
        seeds=arguments.seeds,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        teacher=teacher,
    )
    _save(arguments, evaluation)
    for name, interval in evaluation.summary.items():
        print(f"{name:<18} {format_cell(interval, _DIGITS.get(name, 3))}")
    print(f"{interval.n} prompts, {len(arguments.seeds)} seeds; written to {arguments.output_dir}")
    return 0


def _save(arguments: argparse.Namespace, evaluation: Evaluation) -> None:
    results = {
        "settings": {
            **evaluation.settings,
            "model": arguments.model,
            "adapter": arguments.adapter,
            "teacher": arguments.teacher,
            "dataset": arguments.dataset,
            "split": arguments.split,
        },
        "versions": {"minillm-trl": __version__, "torch": version("torch"), "transformers": version("transformers")},
        "summary": {name: interval._asdict() for name, interval in evaluation.summary.items()},
        "per_prompt": evaluation.per_prompt,
    }
    samples = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("samples.jsonl", samples)):
        temporary = arguments.output_dir / f".{name}.partial"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, arguments.output_dir / name)
