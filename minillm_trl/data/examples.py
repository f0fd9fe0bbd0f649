"""Check every example of a table and collect its references."""

from typing import Any, Literal

from ..files.messages import DataError, listing, nearest, shortened
from .files import Table

ROLES = ("system", "developer", "user", "assistant", "tool")

Kind = Literal["text", "conversation"]


def find_columns(
    table: Table, prompt_column: str, completion_column: str, references_column: str, require_completion: bool
) -> dict[str, str]:
    """Map `prompt`, `completion` and `references` to their column names in the table, omitting absent optional ones.

    Raises:
        DataError: if a required or explicitly named column is missing, two options name the same column, or renaming a
            column would collide with another.
    """
    options = {"prompt": prompt_column, "completion": completion_column, "references": references_column}
    required = {"prompt": True, "completion": require_completion, "references": False}
    found = {}
    for role, name in options.items():
        if name in table.columns:
            found[role] = name
        elif required[role] or name != role:
            raise DataError(
                f"{table.source}: no column {name!r}; its columns are {listing(table.columns)}."
                f"{nearest(name, table.columns)} Name the right one with {role}_column, or rename it."
                + (_hint(table) if role == "prompt" else "")
            )
    for role, name in found.items():
        if list(found.values()).count(name) > 1:
            raise DataError(f"{table.source}: column {name!r} is named by two options. Change {role}_column.")
        if role != name and role in table.columns:
            raise DataError(
                f"{table.source}: {role}_column={name!r} becomes {role!r}, but another column already has that name; "
                f"the columns are {listing(table.columns)}. Drop or rename {role!r}, or leave {role}_column out."
            )
    return found


def _hint(table: Table) -> str:
    """Return advice on columns that other tools use, with a leading space."""
    hints = {
        "text": "Plain text is for sft and kd, or for lm_dataset.",
        "conversations": "For whole conversations, name it `messages`, each with `role` and `content`.",
        "instruction": "`minillm-trl prepare-data --task instructions` turns instructions into prompts.",
    }
    return "".join(f" {hint}" for name, hint in hints.items() if name in table.columns)


def check_examples(table: Table, found: dict[str, str], require_completion: bool) -> list[list[str]] | None:
    """Check every row and return its references: the given references, or else the text of its completion.

    Args:
        table (`Table`): the rows.
        found (`dict[str, str]`): the result of [`find_columns`].
        require_completion (`bool`): whether every row must have a completion.

    Returns:
        `list[list[str]]`, one list per row, empty only if the completion is null and there is no column of references;
        `None` if the table has neither column.

    Raises:
        DataError: at the first bad row.
    """
    completions, references = (
        table.columns[found[role]] if role in found else None for role in ("completion", "references")
    )
    gathered = []
    first_kind = None
    for index, prompt in enumerate(table.columns[found["prompt"]]):
        place = table.place(index)
        kind = _kind(prompt, place, found["prompt"])
        if kind == "conversation":
            _check_turns(prompt, place, found["prompt"])
        first_kind = first_kind or kind
        if kind != first_kind:
            raise DataError(
                f"{place}: field {found['prompt']!r} is a {kind}, {shortened(prompt)}, but the rows from "
                f"{table.place(0)} on hold a {first_kind}. Use the same kind in the whole file."
            )
        answers = []
        if completions is not None:
            answers = _check_completion(completions[index], kind, place, found["completion"], require_completion)
        if references is not None:
            answers = _check_references(references[index], place, found["references"])
        gathered.append(answers)
    return gathered if len(found) > 1 else None


def _check_turns(prompt: list[dict[str, Any]], place: str, field: str) -> None:
    """Refuse a conversation that leaves the model nothing to answer."""
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: field {field!r} ends with an assistant message, {shortened(prompt[-1])}. Move it to the "
            "completion: a prompt ends where the model's turn begins."
        )
    if all(message["role"] != "user" for message in prompt):
        raise DataError(
            f"{place}: field {field!r} has no user message, {shortened(prompt)}. Add the message that the model is to "
            "answer, or drop the row."
        )


def _kind(value: Any, place: str, field: str) -> Kind:
    """Return whether a value is text or a conversation; refuse everything else and anything empty."""
    if isinstance(value, str) and value.strip():
        return "text"
    if isinstance(value, str):
        raise DataError(f"{place}: field {field!r} is empty ({value!r}). Fill it in or drop the row.")
    if value is None:
        raise DataError(f"{place}: field {field!r} is missing or null. Fill it in or drop the row.")
    if not isinstance(value, list):
        raise DataError(
            f"{place}: field {field!r} is {shortened(value)} ({type(value).__name__}). Make it text, or a list of "
            '{"role": ..., "content": ...} messages.'
        )
    if not value:
        raise DataError(f"{place}: field {field!r} is an empty list of messages. Fill it in or drop the row.")
    for position, message in enumerate(value):
        _check_message(message, f"{place}: field {field!r}, message {position} (counting from 0)")
    return "conversation"


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f'{where} is {shortened(message)}. Make it {{"role": ..., "content": ...}}.')
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"{where} has the role {shortened(role)}; known are {listing(ROLES)}.{nearest(str(role), ROLES)} The "
            f"message is {shortened(message)}."
        )
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"{where} has the content {shortened(content)}. Make it text: no other content is supported.")
    if role == "user" and not content.strip():
        raise DataError(f"{where} is the user's and empty ({content!r}). Fill it in or drop the row.")


def _check_completion(value: Any, prompt_kind: Kind, place: str, field: str, required: bool) -> list[str]:
    """Check a completion and return its text as the only reference; an empty list if it is null and may be."""
    if value is None and not required:
        return []
    kind = _kind(value, place, field)
    if kind != prompt_kind:
        raise DataError(
            f"{place}: field {field!r} is a {kind}, {shortened(value)}, but its prompt is a {prompt_kind}. Use one "
            'kind: as a conversation, a completion is [{"role": "assistant", "content": ...}].'
        )
    if kind == "text":
        return [value]
    if value[0]["role"] != "assistant":
        raise DataError(
            f"{place}: field {field!r} begins with the role {value[0]['role']!r}. The first message of a completion "
            "is the assistant's; move what comes before to the prompt."
        )
    if not value[0]["content"].strip():
        raise DataError(
            f"{place}: field {field!r} begins with an empty message, {shortened(value[0])}. Fill it in or drop the "
            "row."
        )
    return [value[0]["content"]]


def _check_references(value: Any, place: str, field: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{place}: field {field!r} is {shortened(value)}. Make it a text, or a non-empty list of non-empty texts."
        )
    return texts
