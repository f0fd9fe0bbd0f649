"""`minillm-trl offline-teacher`: store a teacher's log-probs of given completions, to train without the teacher."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..errors import UserError
from .arguments import PlainParser, parse_plain
from .option_values import json_object
from .serve_teacher import DTYPES, load_service

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..teacher_server.protocol import Row
    from ..teacher_server.service import TeacherService


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser("offline-teacher", description=__doc__)
    parser.add_argument("--model", required=True, help="name or folder of the student, for tokenizer and vocabulary")
    parser.add_argument("--teacher", required=True, help="name or folder of the teacher, or of an adapter")
    parser.add_argument(
        "--dataset", "--dataset_name", required=True, help="prompts and completions, see `minillm-trl sft --help`"
    )
    parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--output_dir", required=True, help="folder of the scores; the same command resumes it")
    parser.add_argument("--top_k", type=int, default=64, help="likeliest tokens to store (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the log-probs (default: %(default)s)")
    parser.add_argument(
        "--max_completion_length", type=int, default=256, help="that of the training (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a forward pass (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="by default half precision on a GPU, float32 on a CPU"
    )
    parser.add_argument("--revision", help="of the teacher: branch, tag or commit on the hub")
    parser.add_argument("--model_init_kwargs", type=json_object, help="of the teacher: arguments of from_pretrained")
    parser.add_argument("--eos_tokens", nargs="+", metavar="TOKEN", help="those of the training, if it sets them")
    parser.add_argument("--chat_template_kwargs", type=json_object, help="arguments of the chat template, as JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the models")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, score the completions, and write or complete the folder."""
    arguments = parse_plain(build_parser(), argv)
    for name in ("top_k", "temperature", "max_completion_length", "batch_size"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name} must be positive, got {getattr(arguments, name)}.")
    from ..data import load_examples
    from ..models.adapters import refuse_adapter
    from ..models.encoding import holds_conversations
    from ..models.loading import load_tokenizer
    from ..models.teacher import check_same_tokenizer
    from ..teacher_server.stored import store_scores
    from .examples import distinct_prompts

    refuse_adapter("--model", arguments.model)
    examples = load_examples(arguments.dataset, split=arguments.split, require_completion=True)
    examples = distinct_prompts(examples, arguments.dataset, keep_completion=True)
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    of_teacher = load_tokenizer(arguments.teacher, arguments.revision, arguments.trust_remote_code)
    check_same_tokenizer(tokenizer, of_teacher, holds_conversations(examples))
    service = load_service(arguments, arguments.teacher)
    rows = _rows(arguments, examples, tokenizer, service)
    bar = tqdm(total=len(rows), desc="Scoring", unit=" completions")
    store_scores(
        service,
        rows,
        Path(arguments.output_dir),
        top_k=arguments.top_k,
        temperature=arguments.temperature,
        vocab_size=_vocab_size(arguments, service),
        max_completion_length=arguments.max_completion_length,
        on_rows=bar.update,
    )
    bar.close()
    tokens = sum(len(row.completion) for row in rows)
    print(f"{arguments.output_dir} has the scores of {len(rows)} completions, {tokens} tokens.", file=sys.stderr)
    return 0


def _rows(
    arguments: argparse.Namespace,
    examples: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    service: "TeacherService",
) -> "list[Row]":
    """Return the tokens of the data, with the end tokens that training settles on."""
    from transformers import GenerationConfig

    from ..models.encoding import holds_conversations
    from ..models.end_tokens import read_generation_config
    from ..teacher_server.stored import given_rows
    from ..training.ends_of_run import settle_tokenizer

    settle_tokenizer(
        tokenizer,
        conversational=holds_conversations(examples),
        student=read_generation_config(arguments.model, trust_remote_code=arguments.trust_remote_code),
        teacher=GenerationConfig(eos_token_id=service.identity.eos_token_ids or None),
        eos_tokens=arguments.eos_tokens,
        chat_template_kwargs=arguments.chat_template_kwargs,
    )
    length, kwargs = arguments.max_completion_length, arguments.chat_template_kwargs
    return list(given_rows(list(examples), tokenizer, length, kwargs))


def _vocab_size(arguments: argparse.Namespace, service: "TeacherService") -> int:
    """Return the number of leading vocabulary rows that student and teacher share."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    size = service.identity.vocab_size
    assert size is not None  # a local model has a head
    return min(size, config.get_text_config().vocab_size)
