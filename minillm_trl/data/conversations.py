"""Split whole conversations (a `messages` column) into prompts and completions."""

from dataclasses import replace
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..files.messages import DataError, shortened
from .files import Table

MESSAGES = "messages"
_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call")
_NO_TOOLS = "Tools are not supported: no subcommand shows them to the model. Drop the row, or write the tools as text."


def split_conversations(table: Table, column: str, require_completion: bool = True) -> Table:
    """Split each conversation into a prompt and the assistant's last message, its completion.

    Args:
        table (`Table`): has a column of conversations and no column of completions.
        column (`str`): name of the column of conversations.
        require_completion (`bool`, *optional*, defaults to `True`): refuse conversations that end with a user message.
            Otherwise the whole conversation is the prompt and the completion is None.

    Returns:
        [`Table`] in which `column` holds the prompts and the new column `completion` the completions.

    Raises:
        DataError: naming file and line, the value and the fix.
    """
    refuse_tools(table)
    pairs = [
        _split(messages, table.place(index), column, require_completion)
        for index, messages in enumerate(table.columns[column])
    ]
    split: dict[str, list[Any]] = {
        column: [prompt for prompt, _ in pairs],
        "completion": [completion for _, completion in pairs],
    }
    dataset = None
    if table.dataset is not None:
        others = [name for name in table.dataset.column_names if name != column]
        dataset = Dataset.from_dict(split)
        if others:
            dataset = concatenate_datasets([dataset, table.dataset.select_columns(others)], axis=1)
    return replace(table, columns={**table.columns, **split}, dataset=dataset)


def holds_whole_conversations(table: Table, column: str, completion_column: str) -> bool:
    """Return whether a column holds conversations that include their answers.

    True for `messages`, and for any column whose first conversation ends with the assistant. Never for `prompt`: a
    prompt that ends with an answer is a mistake, which the checks report.
    """
    if column not in table.columns or completion_column in table.columns or column == "prompt":
        return False
    first = next(iter(table.columns[column]), None)
    last = first[-1] if isinstance(first, list) and first else None
    return column == MESSAGES or (isinstance(last, dict) and last.get("role") == "assistant")


def refuse_tools(table: Table) -> None:
    """Refuse rows with tools.

    Raises:
        DataError: naming the first such row.
    """
    for index, tools in enumerate(table.columns.get("tools", ())):
        if tools:
            raise DataError(f"{table.place(index)}: field 'tools' is {shortened(tools)}. {_NO_TOOLS}")


def refuse_tool_calls(value: Any, place: str, field: str) -> None:
    """Refuse messages that call a tool or hold its result.

    Raises:
        DataError: naming the first such message.
    """
    for position, message in enumerate(value if isinstance(value, list) else []):
        for name in _TOOL_FIELDS if isinstance(message, dict) else ():
            if message.get(name):
                raise DataError(
                    f"{place}: field {field!r}, message {position} (counting from 0) has {name!r}, "
                    f"{shortened(message[name])}. {_NO_TOOLS}"
                )


def _split(
    messages: Any, place: str, field: str, require_completion: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    fix = "Make it a list of text messages that ends with the assistant's."
    if not isinstance(messages, list):
        raise DataError(f"{place}: field {field!r} is {shortened(messages)}. {fix}")
    refuse_tool_calls(messages, place, field)
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    # Arrow gives every message the union of all messages' fields, with null for the absent ones
    messages = [_without_nulls(message) if isinstance(message, dict) else message for message in messages]
    if not require_completion and roles and roles[-1] == "user":
        return messages, None
    if len(roles) < 2 or roles[-1] != "assistant":
        raise DataError(f"{place}: field {field!r} has the roles {roles}. {fix}")
    if not isinstance(messages[-1].get("content"), str):
        raise DataError(f"{place}: field {field!r} ends with {shortened(messages[-1])}. {fix}")
    if roles[-2] == "assistant":
        raise DataError(
            f"{place}: field {field!r} ends with two assistant messages, {shortened(messages[-2:])}. Join them, "
            "or put a user message between them."
        )
    return messages[:-1], messages[-1:]


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None or name in ("role", "content")}
