"""`minillm-trl generate`: sample completions from a model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..errors import UserError
from ..files.whole_files import write_whole
from .arguments import PlainParser, parse_plain
from .chat import add_chat_options, as_conversations, chat_options, check_chat

if TYPE_CHECKING:
    from ..models.encoding import Prompt


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser("generate", description=__doc__)
    parser.add_argument("--model", required=True, help="name or folder of a model, or of a PEFT adapter alone")
    parser.add_argument("--adapter", help="name or folder of a PEFT adapter for the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="texts of prompts; \\n becomes a line break")
    source.add_argument("--dataset", "--dataset_name", help="prompts from a dataset, see `minillm-trl sft --help`")
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--max_rows", type=int, help="use the first prompts only")
    parser.add_argument("--output", default="-", help="a .jsonl file, or - for standard output (default)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")
    parser.add_argument("--num_samples", type=int, default=1, help="completions for each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="prompts decoded together (default: 64)")
    add_chat_options(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, sample, and write one JSON object per line: prompt, completion, sample, finished."""
    arguments = parse_plain(build_parser(), argv)
    for name in ("max_new_tokens", "temperature", "num_samples", "batch_size"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name} must be positive, got {getattr(arguments, name)}.")
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}.")
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise UserError(f"--max_rows must be positive, got {arguments.max_rows}.")
    if arguments.output != "-" and Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output}: this is a folder. Name a file in it.")
    if arguments.output != "-" and not Path(arguments.output).absolute().parent.is_dir():
        raise UserError(
            f"--output {arguments.output}: there is no folder {Path(arguments.output).parent}. Make it first."
        )
    if arguments.greedy and arguments.num_samples > 1:
        raise UserError("--greedy gives the same completion each time: drop --num_samples, or sample.")
    return _generate(arguments)


def _generate(arguments: argparse.Namespace) -> int:
    # torch and transformers take seconds to import, and `--help` does not need them
    from ..models.loading import load_model, load_tokenizer
    from ..rollouts.prompts import generate_completions

    prompts = _load_prompts(arguments)
    tokenizer = load_tokenizer(
        arguments.model, trust_remote_code=arguments.trust_remote_code, adapter=arguments.adapter
    )
    check_chat(tokenizer, arguments, prompts)
    model = load_model(
        arguments.model,
        arguments.adapter,
        trust_remote_code=arguments.trust_remote_code,
        allow_pickled_weights=arguments.allow_pickled_weights,
    )
    lines = []
    bar = tqdm(total=len(prompts) * arguments.num_samples, desc="Generating", unit=" completions")
    for sample in range(arguments.num_samples):
        completions = generate_completions(
            model,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            sample=sample,
            batch_size=arguments.batch_size,
            greedy=arguments.greedy,
            on_batch=bar.update,
            **chat_options(arguments),
        )
        lines += [
            json.dumps(
                {"prompt": prompt, "completion": completion.text, "sample": sample, "finished": completion.finished},
                ensure_ascii=False,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    bar.close()
    _write(arguments.output, "\n".join(lines) + "\n")
    return 0


def _load_prompts(arguments: argparse.Namespace) -> "Sequence[Prompt]":
    if arguments.prompt:
        prompts = [prompt.replace("\\n", "\n") for prompt in arguments.prompt]
    else:
        from ..data import load_examples
        from .examples import distinct_prompts

        examples = load_examples(arguments.dataset, split=arguments.split, prompt_column=arguments.prompt_column)
        prompts = distinct_prompts(examples, arguments.dataset)["prompt"][: arguments.max_rows]
    return as_conversations(prompts) if arguments.chat else prompts


def _write(output: str, text: str) -> None:
    if output == "-":
        sys.stdout.write(text)
        return
    write_whole(Path(output), text)
