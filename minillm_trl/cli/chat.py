"""Options of the subcommands that ask a model, for chat models."""

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
    """Add what says how prompts reach a chat model, and what ends its answers."""
    parser.add_argument(
        "--chat", action="store_true", help="take prompts that are texts for messages of the user's, for a chat model"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="what else the chat template is given, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--eos_tokens", nargs="+", metavar="TOKEN", help=EOS_TOKENS_HELP)


def chat_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the functions that sample take of these options."""
    return {"eos_tokens": arguments.eos_tokens, "chat_template_kwargs": arguments.chat_template_kwargs}


def as_conversations(prompts: Sequence["Prompt"]) -> list["Prompt"]:
    """Make a message of the user's of each prompt that is a text."""
    return [make_prompt(prompt, "", "chat") if isinstance(prompt, str) else prompt for prompt in prompts]


def check_chat(
    tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace, prompts: Sequence["Prompt"]
) -> None:
    """Check that there is a chat template for `--chat`, and hint at it where texts go to a chat model.

    Texts in the wrapper of instructions, or with special tokens of their own, are taken for what was meant.

    Raises:
        ValueError: if there is none.
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
            f"{arguments.model} has a chat template, and the prompts are texts, which do not go through it. For a "
            "chat model add --chat.",
            file=sys.stderr,
        )
