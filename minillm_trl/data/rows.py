"""Build the rows that `prepare-data` filters and writes, with the same checks as in every other subcommand."""

from collections.abc import Callable, Sequence
from typing import Any

from ..files.messages import DataError
from .conversations import MESSAGES, refuse_tool_calls, refuse_tools, split_conversations
from .corpus import load_corpus
from .examples import check_examples, find_columns
from .files import Table
from .instructions import Instruction
from .load import make_examples, read_table
from .prepare import Row
from .templates import Template, is_empty, make_completion, make_prompt


def instruction_rows(instructions: Sequence[Instruction], template: Template) -> list[Row]:
    """Return one row per instruction, in the template.

    Raises:
        DataError: naming the place in the source.
    """
    rows = [
        {
            "prompt": make_prompt(instruction.instruction, instruction.context, template),
            "completion": make_completion(instruction.references[0], template),
            "references": instruction.references,
            "instruction": instruction.instruction,
            "input": instruction.context,
            "category": instruction.category,
            "row": instruction.row,
        }
        for instruction in instructions
    ]
    _check(rows, lambda index: instructions[index].place, "prompt")
    return rows


def read_example_rows(
    source: str,
    columns: dict[str, str],
    *,
    split: str,
    dataset_config: str | None,
    template: Template | None = None,
) -> list[Row]:
    """Read prompts with their completions and references, if any, or `messages` whose last one is the completion.

    Args:
        source (`str`): file, folder or name on the hub, see [`load_examples`].
        columns (`dict[str, str]`): names of the columns `prompt`, `completion` and `references`, if different.
        split, dataset_config: see [`load_examples`].
        template (`str`, *optional*): template for text prompts and completions; unchanged by default.

    Returns:
        `list[dict]`, in the source's order. A row with an empty completion will be dropped, so it is not checked and
        becomes `{"completion": ""}`.

    Raises:
        DataError: naming file and line, field and fix.
    """
    table = read_table(source, split, dataset_config, None)
    refuse_tools(table)
    if not columns and "prompt" not in table.columns and MESSAGES in table.columns:
        return _in_template(_conversation_rows(table), template, table)
    names = {role: columns.get(role, role) for role in ("prompt", "completion", "references")}
    found = find_columns(table, names["prompt"], names["completion"], names["references"], require_completion=False)
    completions = table.columns[found["completion"]] if "completion" in found else []
    for role in found.keys() - {"references"}:
        for index, value in enumerate(table.columns[found[role]]):
            refuse_tool_calls(value, table.place(index), found[role])
    # without any completion, the rows are prompts to sample from rather than incomplete examples
    has_completions = any(completion is not None for completion in completions)
    unused = set() if has_completions else {"completion"} | ({"references"} - found.keys())
    empty = {index for index, completion in enumerate(completions) if is_empty(completion)}
    filled = [index for index in range(len(table.columns[found["prompt"]])) if index not in empty]
    checked = make_examples(table.select(filled), found, has_completions).to_list() if filled else []
    made = {
        index: {name: value for name, value in row.items() if name not in unused}
        for index, row in zip(filled, checked, strict=True)
    }
    rows = [made.get(index, {"completion": ""}) for index in range(len(filled) + len(empty))]
    return _in_template(rows, template, table)


def read_text_rows(source: str, text_column: str, *, split: str, dataset_config: str | None) -> list[Row]:
    """Read plain text, one row per document.

    Raises:
        DataError: naming file and line, the value and the fix.
    """
    corpus = load_corpus(source, split=split, text_column=text_column, dataset_config=dataset_config)
    if "text" not in corpus.column_names:
        raise DataError(
            f"{source}: has no column {text_column!r}, but prompts and completions. Use --task examples (lm_dataset "
            "reads its folder too), or set text_column to the column with the text."
        )
    return corpus.to_list()


def _in_template(rows: list[Row], template: Template | None, table: Table) -> list[Row]:
    if template is None:
        return rows
    for index, row in enumerate(rows):
        if "prompt" not in row:  # the completion is empty, so the filters will drop the row
            continue
        if not isinstance(row["prompt"], str):
            raise DataError(
                f"{table.place(index)}: the prompt is a conversation, but template={template!r} is for texts. Leave "
                "template out."
            )
        row["prompt"] = make_prompt(row["prompt"], "", template)
        if row.get("completion") is not None:
            row["completion"] = make_completion(row["completion"], template)
    return rows


def _conversation_rows(table: Table) -> list[Row]:
    columns = split_conversations(table, MESSAGES).columns
    rows = [
        {"prompt": prompt, "completion": completion, "references": [completion[0]["content"]]}
        for prompt, completion in zip(columns[MESSAGES], columns["completion"], strict=True)
    ]
    _check(rows, table.place, MESSAGES)
    return rows


def _check(rows: Sequence[Row], place: Callable[[int], str], field: str) -> None:
    """Refuse the rows that a subcommand would refuse, naming their place and `field`, the source of the prompts."""
    filled = [index for index, row in enumerate(rows) if not is_empty(row["completion"])]  # the filters drop the rest

    def column(name: str) -> list[Any]:
        return [rows[index][name] for index in filled]

    columns = {field: column("prompt"), "completion": column("completion"), "references": column("references")}
    table = Table("", columns, lambda index: place(filled[index]))
    found = {"prompt": field, "completion": "completion", "references": "references"}
    check_examples(table, found, require_completion=True)
