"""Turn an instruction and its input into a prompt."""

from typing import Any, Literal

Template = Literal["alpaca", "chat"]


def format_instruction(instruction: str, context: str = "") -> str:
    """Wrap an instruction in the Alpaca-style template of the authors' code (`process_data_dolly.py`).

    Args:
        instruction (`str`): the instruction.
        context (`str`, *optional*): the input that the instruction refers to. If empty, the prompt has no `### Input:`
            section.
    """
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    if not context:
        return f"{task}. {request}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    task += ", paired with an input that provides further context"
    return f"{task}. {request}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def split_instruction(prompt: str) -> tuple[str, str] | None:
    """Return instruction and input (empty if there is none) of a wrapped prompt; None if the prompt is not wrapped."""
    before, between, after = format_instruction("\0", "\0").split("\0")
    if prompt.startswith(before) and prompt.endswith(after) and between in prompt:
        instruction, _, context = prompt[len(before) : -len(after)].partition(between)
        return instruction, context
    before, after = format_instruction("\0").split("\0")
    if prompt.startswith(before) and prompt.endswith(after):
        return prompt[len(before) : -len(after)], ""
    return None


def make_prompt(instruction: str, context: str, template: Template) -> str | list[dict[str, str]]:
    """Return the prompt of an instruction: the wrapped text, or a conversation of one message for chat models."""
    if template == "alpaca":
        return format_instruction(instruction, context)
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]


def make_completion(text: str, template: Template) -> str | list[dict[str, str]]:
    """Return the answer in the form of [`make_prompt`]'s prompt."""
    return text if template == "alpaca" else [{"role": "assistant", "content": text}]


def is_empty(value: Any) -> bool:
    """Return whether a completion has no text. False for values of other types, which the checks refuse."""
    if isinstance(value, list):
        return all(isinstance(message, dict) and is_empty(message.get("content")) for message in value)
    return isinstance(value, str) and not value.strip()


def message_text(value: Any) -> str:
    """Return the text of a prompt or completion, whether text or conversation."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)
