"""Read instruction data in its published formats: Dolly, SelfInst, Vicuna, S-NI, UnNI."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.json_files import parse_json
from ..files.messages import DataError, listing, nearest, shortened
from .files import Table, check_characters, has_surrogates, read_text_file
from .load import read_table
from .templates import is_empty


@dataclass(frozen=True)
class Instruction:
    """One instruction with its answers.

    Attributes:
        instruction (`str`): the task.
        context (`str`): the input that the instruction refers to, or an empty string.
        references (`list[str]`): the answers. The first one is the training target.
        category (`str`): kind of task, or an empty string.
        row (`int`): row number in the source, from 0.
        place (`str`): place in the source, for error messages.
    """

    instruction: str
    context: str
    references: list[str]
    category: str
    row: int
    place: str


def read_instructions(
    source: str, *, split: str = "train", dataset_config: str | None = None, max_rows: int | None = None
) -> list[Instruction]:
    """Read a table with one `instruction` per row. The other columns may have any of their usual names.

    - input: `context` (Dolly), `input` (Alpaca, S-NI, UnNI), or no column;
    - answers: `response` (Dolly), `output` (Alpaca, UnNI; a list in S-NI), or `completion`;
    - kind of task: `category`, `topic` or `task`, or no column;
    - `instances` (SelfInst, UnNI): a list of objects with `input` and `output`; every object becomes a row.

    Args:
        source (`str`): file, folder or name on the hub, see [`load_examples`].
        split, dataset_config, max_rows: see [`load_examples`].

    Raises:
        DataError: naming file and line, field and fix.
    """
    table = read_table(source, split, dataset_config, max_rows)
    if "instruction" not in table.columns:
        raise DataError(
            f"{table.source}: no column 'instruction'; its columns are {listing(table.columns)}."
            f"{nearest('instruction', table.columns)} Rename the right one, or use --task examples for data with "
            "prompts or `messages`."
        )
    rows = []
    for index, instruction in enumerate(table.columns["instruction"]):
        place = table.place(index)
        instruction = _text(instruction, place, "instruction")
        category = next((_text(cell, place, name, True) for name, cell in _cells(table, index, _CATEGORIES)), "")
        for context, references in _answers(table, index):
            rows.append(Instruction(instruction, context, references, category, index, place))
    if not rows:
        raise DataError(f"{table.source}: the field 'instances' is an empty list in all rows. Fill it in.")
    return rows


_CONTEXTS = ("context", "input")
_ANSWERS = ("response", "output", "completion")
_CATEGORIES = ("category", "topic", "task")


def _cells(table: Table, index: int, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the names that the table has as columns, with the row's values, in the order of `names`."""
    return ((name, table.columns[name][index]) for name in names if name in table.columns)


def _answers(table: Table, index: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the input and the answers of a row, or of every one of its instances."""
    place = table.place(index)
    if "instances" in table.columns:
        instances = table.columns["instances"][index]
        if not isinstance(instances, list) or not all(isinstance(instance, Mapping) for instance in instances):
            raise DataError(f"{place}: field 'instances' is {shortened(instances)}. Make it a list of objects.")
        for number, instance in enumerate(instances):
            where = f"{place}: field 'instances', number {number} (counting from 0)"
            context = _text(instance.get("input", ""), where, "input", True)
            yield context, _texts(instance.get("output"), where, "output")
        return
    found = next(_cells(table, index, _ANSWERS), None)
    if found is None:
        raise DataError(
            f"{table.source}: no column with the answers; its columns are {listing(table.columns)}. Rename it to one "
            f"of {listing(_ANSWERS)}."
        )
    name, context = next(_cells(table, index, _CONTEXTS), ("context", ""))
    yield _text(context, place, name, True), _texts(found[1], place, found[0])


def _text(value: Any, place: str, field: str, may_be_empty: bool = False) -> str:
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise DataError(f"{place}: field {field!r} is {shortened(value)}. Make it text, or drop the row.")
    return value if value.strip() else ""


def _texts(value: Any, place: str, field: str) -> list[str]:
    """Return one or several answers without the empty ones, except an empty first one: the filters drop such rows."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str) for text in values):
        raise DataError(f"{place}: field {field!r} is {shortened(value)}. Make it text or a list of texts.")
    return values[:1] + [text for text in values[1:] if text.strip()]


def read_vicuna(questions: str, answers: str) -> list[Instruction]:
    """Read the Vicuna benchmark: a file of questions (`question_id`, `turns`) and a file of answers.

    Args:
        questions (`str`): `question.jsonl`; the first turn is the instruction.
        answers (`str`): the file of answers, `text` or MT-bench's `choices`, joined by `question_id`.

    Raises:
        DataError: if a field is missing, or a question has no answer or more than one.
    """
    found: dict[str, tuple[str, str]] = {}
    table = _require(read_table(answers, "train", None, None), "question_id")
    for index, number in enumerate(table.columns["question_id"]):
        place = table.place(index)
        if str(number) in found:
            raise DataError(f"{place}: a second answer to question {number}; the first: {found[str(number)][1]}.")
        found[str(number)] = _vicuna_answer(table, index), place
    rows = []
    table = _require(read_table(questions, "train", None, None), "question_id", "turns")
    for index, (number, turns) in enumerate(zip(table.columns["question_id"], table.columns["turns"], strict=True)):
        place = table.place(index)
        if str(number) not in found:
            raise DataError(
                f"{place}: no answer to question {number} in {answers}. Use the answers to these questions."
            )
        if _first(turns) is None:
            raise DataError(f"{place}: field 'turns' is {shortened(turns)}. Make it a list with the question.")
        instruction = _text(turns[0], place, "turns")
        category = next((str(cell or "") for _, cell in _cells(table, index, _CATEGORIES)), "")
        rows.append(Instruction(instruction, "", [found[str(number)][0]], category, index, place))
    return rows


def _vicuna_answer(table: Table, index: int) -> str:
    """Return `text`, or the first turn of MT-bench's first choice."""
    place = table.place(index)
    cells = dict(_cells(table, index, ("text", "choices")))
    if cells.get("text") is not None or cells.get("choices") is None:
        # keep an empty text: the filters drop the row
        return cells["text"] if is_empty(cells.get("text")) else _text(cells.get("text"), place, "text")
    choice = _first(cells["choices"])
    turn = _first(choice.get("turns")) if isinstance(choice, Mapping) else None
    if not isinstance(turn, str):
        raise DataError(
            f"{place}: field 'choices' is {shortened(cells['choices'])}. Make it "
            '[{"turns": ["the answer"]}], or give the answer as text.'
        )
    return turn


def _first(value: Any) -> Any:
    """Return the first entry of a list, or None if it is empty or the value is no list."""
    return value[0] if isinstance(value, list) and value else None


def _require(table: Table, *names: str) -> Table:
    for name in names:
        if name not in table.columns:
            raise DataError(f"{table.source}: no column {name!r}; its columns are {listing(table.columns)}.")
    return table


def natural_instructions_files(folder: Path) -> list[Path]:
    """Return the files that [`read_natural_instructions`] reads: the list of English test tasks, then the tasks.

    Raises:
        DataError: if a file is missing or the list is empty.
    """
    listed = folder / "splits" / "default" / "test_tasks.txt"
    if not listed.is_file():
        raise DataError(
            f"{folder}: no splits/default/test_tasks.txt. Give the path of a clone of allenai/natural-instructions."
        )
    names = [row["text"].strip() for row in read_text_file(listed).to_dataset()]
    there = {path.stem for path in (folder / "tasks").glob("*.json")}
    for name in names:
        if name not in there:
            raise DataError(f"{folder}: no task {shortened(name)}, which {listed} names. Complete the clone.")
    return [listed, *(folder / "tasks" / f"{name}.json" for name in names)]


def read_natural_instructions(
    folder: Path, instances_per_task: int, on_task: Callable[[], object]
) -> list[Instruction]:
    """Read the English test tasks from a clone of the Super-NaturalInstructions repository.

    Args:
        folder (`Path`): holds `splits/default/test_tasks.txt` and `tasks/<name>.json`.
        instances_per_task (`int`): number of instances to read from each task, the first ones.
        on_task (`Callable`): called after each task.

    Raises:
        DataError: if a file is missing or has another form.
    """
    rows: list[Instruction] = []
    for path in natural_instructions_files(folder)[1:]:
        task = _read_task(path)
        definition = _definition(task, path)
        instances = task.get("Instances")
        if not isinstance(instances, list) or not instances:
            raise DataError(f"{path}: field 'Instances' is {shortened(instances)}. Copy the file again.")
        for number, instance in enumerate(instances[:instances_per_task]):
            place = f"{path}: field 'Instances', number {number} (counting from 0)"
            if not isinstance(instance, dict) or not {"input", "output"} <= instance.keys():
                raise DataError(
                    f"{place} is {shortened(instance)}, not an object with 'input' and 'output'. Copy the file again."
                )
            context = _text(instance["input"], place, "input", True)
            references = _texts(instance["output"], place, "output")
            rows.append(Instruction(definition, context, references, path.stem, len(rows), place))
        on_task()
    return rows


def _definition(task: dict[str, Any], path: Path) -> str:
    definition = task.get("Definition")
    text = _first(definition) if isinstance(definition, list) else definition
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}: field 'Definition' is {shortened(definition)}, not text. Copy the file again.")
    return text


def _read_task(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        task = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(task, dict):
        raise DataError(f"{path}: is {shortened(task)}, not a JSON object. Copy the file again.")
    if has_surrogates(text):
        check_characters(task, str(path))
    return task
