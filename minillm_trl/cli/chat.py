"""Options for chat models, of the subcommands that sample from a model."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.templates import make_prompt, split_instruction
from ..errors import UserError
from ..models.end_tokens import EOS_TOKENS_HELP, special_ids
from .option_values import json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.encoding import Prompt


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that format prompts for a chat model and end its answers."""
    parser.add_argument("--chat", action="store_true", help="turn text prompts into user messages, for a chat model")
    parser.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="further arguments of the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--eos_tokens", nargs="+", metavar="TOKEN", help=EOS_TOKENS_HELP)


def chat_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return these options as keyword arguments of the sampling functions."""
    return {"eos_tokens": arguments.eos_tokens, "chat_template_kwargs": arguments.chat_template_kwargs}


def as_conversations(prompts: Sequence["Prompt"]) -> list["Prompt"]:
    """Turn each text prompt into a user message."""
    return [make_prompt(prompt, "", "chat") if isinstance(prompt, str) else prompt for prompt in prompts]


def check_chat(
    tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace, prompts: Sequence["Prompt"]
) -> None:
    """Check that `--chat` has a chat template, and suggest it if a chat model gets plain texts.

    Texts in the instruction template, or with special tokens, are assumed to be intended.

    Raises:
        ValueError: if `--chat` is given and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        if arguments.chat:
            raise UserError(f"--chat: the tokenizer of {arguments.model} has no chat template. Leave it out.")
        return
    first = next(iter(prompts), None)
    if not isinstance(first, str) or split_instruction(first) is not None:
        return
    special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    if not any(token in first for token in special):
        print(
            f"{arguments.model} has a chat template, but the prompts are texts, which do not use it. Add --chat for "
            "a chat model.",
            file=sys.stderr,
        )
