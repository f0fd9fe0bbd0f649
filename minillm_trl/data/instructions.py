"""Reads instruction data in the formats that it is published in: Dolly, SelfInst, Vicuna, S-NI, UnNI."""

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
        instruction (`str`): what is asked for.
        context (`str`): the input that it speaks of, or an empty text.
        references (`list[str]`): answers, the first one to learn from.
        category (`str`): kind of task, or an empty text.
        row (`int`): number of its row in the source, from 0.
        place (`str`): where it stands, for messages.
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
    """Read a table with an `instruction` a row, in any of the usual names of the other columns.

    - input: `context` (Dolly), `input` (Alpaca, S-NI, UnNI), or none;
    - answers: `response` (Dolly), `output` (Alpaca, UnNI; in S-NI a list), or `completion`;
    - kind of task: `category`, `topic` or `task`, or none;
    - `instances` (SelfInst, UnNI): a list of objects with `input` and `output`, each of which becomes a row.

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
            f"{nearest('instruction', table.columns)} Rename the right one, or take --task examples for data with "
            "prompts or `messages`."
        )
    rows = []
    for index, instruction in enumerate(table.columns["instruction"]):
        place = table.place(index)
        instruction = _text(instruction, place, "instruction")
        category = next((_text(each, place, name, True) for name, each in _cells(table, index, _CATEGORIES)), "")
        for context, references in _answers(table, index):
            rows.append(Instruction(instruction, context, references, category, index, place))
    if not rows:
        raise DataError(f"{table.source}: the field 'instances' is an empty list in all rows. Fill it in.")
    return rows


_CONTEXTS = ("context", "input")
_ANSWERS = ("response", "output", "completion")
_CATEGORIES = ("category", "topic", "task")


def _cells(table: Table, index: int, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    return ((name, table.columns[name][index]) for name in names if name in table.columns)


def _answers(table: Table, index: int) -> Iterator[tuple[str, list[str]]]:
    """Input and answers of a row, or of each of its instances."""
    place = table.place(index)
    if "instances" in table.columns:
        instances = table.columns["instances"][index]
        if not isinstance(instances, list) or not all(isinstance(each, Mapping) for each in instances):
            raise DataError(f"{place}: field 'instances' is {shortened(instances)}. Make it a list of objects.")
        for number, each in enumerate(instances):
            where = f"{place}: field 'instances', number {number} (counting from 0)"
            context = _text(each.get("input", ""), where, "input", True)
            yield context, _texts(each.get("output"), where, "output")
        return
    found = next(_cells(table, index, _ANSWERS), None)
    if found is None:
        raise DataError(
            f"{table.source}: no column with the answers; its columns are {listing(table.columns)}. Name it one of "
            f"{listing(_ANSWERS)}."
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
    """One or several answers. Empty ones are left out, but for the first: the filters drop the row then."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(each, str) for each in values):
        raise DataError(f"{place}: field {field!r} is {shortened(value)}. Make it text or a list of texts.")
    return values[:1] + [each for each in values[1:] if each.strip()]


def read_vicuna(questions: str, answers: str) -> list[Instruction]:
    """Read the Vicuna benchmark: a file of questions (`question_id`, `turns`) and one of answers to them.

    Args:
        questions (`str`): `question.jsonl`; the first turn is the instruction.
        answers (`str`): the file of answers, `text` or MT-bench's `choices`, joined by `question_id`.

    Raises:
        DataError: if a field is missing, or a question has no answer or two.
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
                f"{place}: no answer to question {number} in {answers}. Take the answers of these questions."
            )
        if _first(turns) is None:
            raise DataError(f"{place}: field 'turns' is {shortened(turns)}. Make it a list with the question.")
        instruction = _text(turns[0], place, "turns")
        category = next((str(each or "") for _, each in _cells(table, index, _CATEGORIES)), "")
        rows.append(Instruction(instruction, "", [found[str(number)][0]], category, index, place))
    return rows


def _vicuna_answer(table: Table, index: int) -> str:
    """`text`, or the first turn of MT-bench's first choice."""
    place = table.place(index)
    cells = dict(_cells(table, index, ("text", "choices")))
    if cells.get("text") is not None or cells.get("choices") is None:
        # an empty one is for the filters to drop
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
    """The first entry of a list; None of what has none."""
    return value[0] if isinstance(value, list) and value else None


def _require(table: Table, *names: str) -> Table:
    for name in names:
        if name not in table.columns:
            raise DataError(f"{table.source}: no column {name!r}; its columns are {listing(table.columns)}.")
    return table


def natural_instructions_files(folder: Path) -> list[Path]:
    """What [`read_natural_instructions`] reads: the list of the English test tasks, and the file of each.

    Raises:
        DataError: if a file is missing or the list is empty.
    """
    listed = folder / "splits" / "default" / "test_tasks.txt"
    if not listed.is_file():
        raise DataError(f"{folder}: no splits/default/test_tasks.txt. Name a clone of allenai/natural-instructions.")
    names = [row["text"].strip() for row in read_text_file(listed).to_dataset()]
    there = {path.stem for path in (folder / "tasks").glob("*.json")}
    for name in names:
        if name not in there:
            raise DataError(f"{folder}: no task {shortened(name)}, which {listed} names. Complete the clone.")
    return [listed, *(folder / "tasks" / f"{name}.json" for name in names)]


def read_natural_instructions(folder: Path, instances_per_task: int, on_task: Callable[[], None]) -> list[Instruction]:
    """Read Super-NaturalInstructions as its repository is laid out: the English test tasks.

    Args:
        folder (`Path`): holds `splits/default/test_tasks.txt` and `tasks/<name>.json`.
        instances_per_task (`int`): the first ones of each task.
        on_task (`Callable`): called after each task.

    Raises:
        DataError: if a file is missing or not in that form.
    """
    rows: list[Instruction] = []
    for path in natural_instructions_files(folder)[1:]:
        task = _read_task(path)
        definition = _definition(task, path)
        instances = task.get("Instances")
        if not isinstance(instances, list) or not instances:
            raise DataError(f"{path}: field 'Instances' is {shortened(instances)}. Copy the file again.")
        for number, each in enumerate(instances[:instances_per_task]):
            place = f"{path}: field 'Instances', number {number} (counting from 0)"
            if not isinstance(each, dict) or not {"input", "output"} <= each.keys():
                raise DataError(
                    f"{place} is {shortened(each)}, no object with 'input' and 'output'. Copy the file again."
                )
            context = _text(each["input"], place, "input", True)
            references = _texts(each["output"], place, "output")
            rows.append(Instruction(definition, context, references, path.stem, len(rows), place))
        on_task()
    return rows


def _definition(task: dict[str, Any], path: Path) -> str:
    definition = task.get("Definition")
    text = _first(definition) if isinstance(definition, list) else definition
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}: field 'Definition' is {shortened(definition)}, no text. Copy the file again.")
    return text


def _read_task(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        task = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(task, dict):
        raise DataError(f"{path}: is {shortened(task)}, no JSON object. Copy the file again.")
    if has_surrogates(text):
        check_characters(task, str(path))
    return task
