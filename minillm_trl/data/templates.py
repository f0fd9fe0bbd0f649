"""How an instruction and its input become a prompt."""

from typing import Any, Literal

Template = Literal["alpaca", "chat"]


def format_instruction(instruction: str, context: str = "") -> str:
    """The Alpaca-style wrapper that the paper's code puts around every instruction (`process_data_dolly.py`).

    Args:
        instruction (`str`): the instruction.
        context (`str`, *optional*): the input that it speaks of; without one the wrapper has no `### Input:`.
    """
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    if not context:
        return f"{task}. {request}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    task += ", paired with an input that provides further context"
    return f"{task}. {request}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def split_instruction(prompt: str) -> tuple[str, str] | None:
    """Instruction and input (empty without one) of a prompt in the wrapper; None if it is not in it."""
    before, between, after = format_instruction("\0", "\0").split("\0")
    if prompt.startswith(before) and prompt.endswith(after) and between in prompt:
        instruction, _, context = prompt[len(before) : -len(after)].partition(between)
        return instruction, context
    before, after = format_instruction("\0").split("\0")
    if prompt.startswith(before) and prompt.endswith(after):
        return prompt[len(before) : -len(after)], ""
    return None


def make_prompt(instruction: str, context: str, template: Template) -> str | list[dict[str, str]]:
    """The prompt of an instruction: the wrapper's text, or a conversation of one message for chat models."""
    if template == "alpaca":
        return format_instruction(instruction, context)
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]


def make_completion(text: str, template: Template) -> str | list[dict[str, str]]:
    """The answer in the same form as [`make_prompt`]'s prompt."""
    return text if template == "alpaca" else [{"role": "assistant", "content": text}]


def is_empty(value: Any) -> bool:
    """Whether a completion has no text. What is no completion at all is not empty: the checks name it."""
    if isinstance(value, list):
        return all(isinstance(each, dict) and is_empty(each.get("content")) for each in value)
    return isinstance(value, str) and not value.strip()


def message_text(value: Any) -> str:
    """The text of a prompt or completion, whichever form it has."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)
