"""Makes the rows that `prepare-data` filters and writes, checked as every subcommand checks what it reads."""

from collections.abc import Callable, Sequence
from typing import Any

from .corpus import load_corpus
from .errors import DataError, shortened
from .examples import check_examples, find_columns
from .files import Table
from .instructions import Instruction
from .load import make_examples, read_table
from .prepare import Row
from .templates import Template, is_empty, make_completion, make_prompt

_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call")
_NO_TOOLS = "Tools are not supported: no subcommand shows them to the model. Drop the row, or write them as text."


def instruction_rows(instructions: Sequence[Instruction], template: Template) -> list[Row]:
    """One row an instruction, in the wrapper.

    Raises:
        DataError: naming the place in the source.
    """
    rows = [
        {
            "prompt": make_prompt(each.instruction, each.context, template),
            "completion": make_completion(each.references[0], template),
            "references": each.references,
            "instruction": each.instruction,
            "input": each.context,
            "category": each.category,
            "row": each.row,
        }
        for each in instructions
    ]
    _check(rows, lambda index: instructions[index].place, "prompt")
    return rows


def read_example_rows(source: str, columns: dict[str, str], *, split: str, dataset_config: str | None) -> list[Row]:
    """Read prompts with what they have of completions and references, or `messages`, of which the last is learnt.

    Args:
        source (`str`): file, folder or name on the hub, see [`load_examples`].
        columns (`dict[str, str]`): names of the columns `prompt`, `completion` and `references`, where they differ.
        split, dataset_config: see [`load_examples`].

    Returns:
        `list[dict]`, in the source's order. A row whose completion is empty is not checked, as it will be dropped; all
        that is left of it is the empty completion.

    Raises:
        DataError: naming file and line, field and fix.
    """
    table = read_table(source, split, dataset_config, None)
    for index, tools in enumerate(table.columns.get("tools", ())):
        if tools:
            raise DataError(f"{table.place(index)}: field 'tools' is {shortened(tools)}. {_NO_TOOLS}")
    if not columns and "prompt" not in table.columns and "messages" in table.columns:
        return _conversation_rows(table)
    names = {role: columns.get(role, role) for role in ("prompt", "completion", "references")}
    found = find_columns(table, names["prompt"], names["completion"], names["references"], require_completion=False)
    completions = table.columns[found["completion"]] if "completion" in found else []
    for role in found.keys() - {"references"}:
        for index, value in enumerate(table.columns[found[role]]):
            _refuse_tool_calls(value, table.place(index), found[role])
    # without a single one they are prompts to sample from, and not rows that lack something
    has_completions = any(each is not None for each in completions)
    unused = set() if has_completions else {"completion"} | ({"references"} - found.keys())
    empty = {index for index, each in enumerate(completions) if is_empty(each)}
    filled = [index for index in range(len(table.columns[found["prompt"]])) if index not in empty]
    checked = make_examples(table.select(filled), found, has_completions).to_list() if filled else []
    made = {
        index: {name: value for name, value in row.items() if name not in unused}
        for index, row in zip(filled, checked, strict=True)
    }
    return [made.get(index, {"completion": ""}) for index in range(len(filled) + len(empty))]


def read_text_rows(source: str, text_column: str, *, split: str, dataset_config: str | None) -> list[Row]:
    """Read plain text.

    Raises:
        DataError: naming file and line, what was seen and the fix.
    """
    corpus = load_corpus(source, split=split, text_column=text_column, dataset_config=dataset_config)
    if "text" not in corpus.column_names:
        raise DataError(
            f"{source}: has no column {text_column!r}, but prompts and completions. Take --task examples, whose "
            "folder lm_dataset reads too, or name the column of text with text_column."
        )
    return corpus.to_list()


def _conversation_rows(table: Table) -> list[Row]:
    rows = [_split(messages, table.place(index)) for index, messages in enumerate(table.columns["messages"])]
    _check(rows, table.place, "messages")
    return rows


def _split(messages: Any, place: str) -> Row:
    """The last message is the completion, all before it the prompt."""
    fix = "Make it a list of messages with texts, of which the last is the assistant's."
    if not isinstance(messages, list):
        raise DataError(f"{place}: field 'messages' is {shortened(messages)}. {fix}")
    _refuse_tool_calls(messages, place, "messages")
    roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
    if len(roles) < 2 or roles[-1] != "assistant":
        raise DataError(f"{place}: field 'messages' has the roles {roles}. {fix}")
    if not isinstance(messages[-1].get("content"), str):
        raise DataError(f"{place}: field 'messages' ends with {shortened(messages[-1])}. {fix}")
    if roles[-2] == "assistant":
        raise DataError(
            f"{place}: field 'messages' ends with two messages of the assistant, {shortened(messages[-2:])}. Join "
            "them, or put the user's between them."
        )
    # Arrow gives every message the fields of all others, as null
    messages = [_without_nulls(each) if isinstance(each, dict) else each for each in messages]
    return {"prompt": messages[:-1], "completion": messages[-1:], "references": [messages[-1]["content"]]}


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None or name in ("role", "content")}


def _refuse_tool_calls(value: Any, place: str, field: str) -> None:
    for position, message in enumerate(value if isinstance(value, list) else []):
        for name in _TOOL_FIELDS if isinstance(message, dict) else ():
            if message.get(name):
                raise DataError(
                    f"{place}: field {field!r}, message {position} (counting from 0) has {name!r}, "
                    f"{shortened(message[name])}. {_NO_TOOLS}"
                )


def _check(rows: Sequence[Row], place: Callable[[int], str], field: str) -> None:
    """Refuse what a subcommand that reads the rows would refuse, by the place and the field that prompts come from."""
    filled = [index for index, row in enumerate(rows) if not is_empty(row["completion"])]  # the others are dropped

    def column(name: str) -> list[Any]:
        return [rows[index][name] for index in filled]

    columns = {field: column("prompt"), "completion": column("completion"), "references": column("references")}
    table = Table("", columns, lambda index: place(filled[index]))
    found = {"prompt": field, "completion": "completion", "references": "references"}
    check_examples(table, found, require_completion=True)
