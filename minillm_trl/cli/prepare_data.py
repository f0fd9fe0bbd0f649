"""`minillm-trl prepare-data`: check, filter and split data, and write it where every other subcommand can read it."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from .. import __version__
from ..data import DataError, load_corpus, load_examples
from ..data.errors import nearest
from ..data.files import Table
from ..data.instructions import Instruction, read_instructions, read_natural_instructions, read_vicuna
from ..data.load import read_table
from ..data.prepare import (
    Filters,
    Prepared,
    Row,
    filter_rows,
    format_statistics,
    split_rows,
    statistics,
    token_counter,
    write_prepared,
)
from ..data.templates import make_completion, make_prompt
from .arguments import Parser, make_parser, parse
from .models import read_tokenizer

Task = Literal["dolly", "selfinst", "vicuna", "sni", "unni", "instructions", "examples", "text"]
_TRAINED_ON = ("dolly", "instructions", "examples", "text")  # the others are test sets
_HUB_NAMES = {"dolly": "databricks/databricks-dolly-15k"}
_DOLLY_ROWS = {"validation_rows": 1000, "test_rows": 500}


@dataclass
class PreparationArguments:
    """What to read, what to keep, and where to write it."""

    task: str = field(
        metadata={
            "help": "dolly, selfinst, vicuna, sni or unni: the paper's data; instructions: any table with a column "
            "`instruction`; examples: any with `prompt` or `messages`; text: plain text for L_PT."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for <split>.jsonl and statistics.json."})
    source: str | None = field(
        default=None,
        metadata={"help": "File, folder or name on the hub. Dolly has a default on the hub."},
    )
    answers: str | None = field(default=None, metadata={"help": "vicuna: the file of answers."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the hub, or of a folder."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Keep this many rows, drawn by `seed`; all by default."}
    )
    instances_per_task: int = field(default=100, metadata={"help": "sni, from its repository: rows of each task."})
    template: Literal["alpaca", "chat"] = field(
        default="alpaca", metadata={"help": "Wrapper of instructions: the paper's text, or a conversation."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer that lengths are counted with; without one, in characters."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Drop rows whose prompt has more tokens (the paper's code: 256)."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Drop rows with more tokens in all (the paper's code keeps them, and training cuts them)."},
    )
    min_reference_length: int | None = field(
        default=None, metadata={"help": "Drop rows whose reference has fewer tokens (11 for the paper's [11, inf))."}
    )
    validation_rows: int | None = field(default=None, metadata={"help": "Rows for validation. dolly: 1000, else 0."})
    test_rows: int | None = field(default=None, metadata={"help": "Rows for testing. dolly: 500, else 0."})
    seed: int = field(default=0, metadata={"help": "Of the split, and of which rows `max_rows` keeps."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a folder that has other settings."})

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            known = ", ".join(get_args(Task))
            raise ValueError(f"task={self.task!r} is none of {known}.{nearest(self.task, get_args(Task))}")
        if self.source is None and self.task not in _HUB_NAMES:
            raise ValueError(f"task={self.task!r} needs source: a file, a folder or a name on the hub.")
        if (self.answers is None) == (self.task == "vicuna"):
            raise ValueError("answers is the file with the answers to Vicuna's questions: give it with task=vicuna.")
        if self.task == "text" and any((self.max_prompt_length, self.max_length, self.min_reference_length)):
            raise ValueError("task=text has no prompts and completions to measure: leave the length limits out.")
        limits = ("max_prompt_length", "max_length", "min_reference_length")
        for name in (*limits, "max_rows", "instances_per_task"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.tokenizer is None and any(getattr(self, name) is not None for name in limits):
            raise ValueError(f"{' and '.join(limits)} count tokens: set tokenizer (a model's name or folder).")
        for name in ("validation_rows", "test_rows"):
            value = getattr(self, name)
            if value is not None and self.task not in _TRAINED_ON:
                raise ValueError(f"{name} has no meaning for {self.task}, all of which is a test set. Leave it out.")
            if value is None:
                setattr(self, name, _DOLLY_ROWS[name] if self.task == "dolly" else 0)
            elif value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")


def build_parser() -> Parser:
    """The subcommand's parser."""
    return make_parser("prepare-data", (PreparationArguments,), __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, read and check the data, and write the folder; a folder that is done is left as it is."""
    (arguments,), launch = parse(build_parser(), argv)
    if launch:
        raise ValueError(f"{next(iter(launch))}: prepare-data runs in one process. Leave it out.")
    folder = Path(arguments.output_dir)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output_dir", "overwrite")}
    settings["sha256"] = {path: _sha256(path) for path in (arguments.source, arguments.answers) if _is_file(path)}
    if _is_done(folder, settings, arguments.overwrite):
        print(f"{folder} was prepared with these settings before.")
        return 0
    tokenizer = None if arguments.tokenizer is None else read_tokenizer(arguments.tokenizer)
    length = token_counter(tokenizer)
    prepared = _prepare(arguments, length)
    stats = statistics(prepared, length)
    unit = "characters" if tokenizer is None else "tokens"
    record = {"settings": settings, "version": __version__, "length_unit": unit, **stats}
    write_prepared(folder, prepared, record)
    print(format_statistics(stats, unit))
    print(f"Written to {folder}")
    return 0


def _prepare(arguments: PreparationArguments, length: Callable[[Any], int]) -> Prepared:
    prepared = Prepared({})
    rows = _read(arguments)
    if arguments.max_rows is not None:
        order = sorted(range(len(rows)), key=lambda row: hashlib.sha256(f"{arguments.seed}:{row}".encode()).digest())
        rows = [rows[index] for index in sorted(order[: arguments.max_rows])]
    if arguments.task == "text":
        texts = list(dict.fromkeys(row["text"] for row in rows))
        prepared.read, prepared.dropped["repeats an earlier row"] = len(rows), len(rows) - len(texts)
        prepared.splits["train"] = [{"text": text} for text in texts]
        return prepared
    filters = Filters(arguments.max_prompt_length, arguments.max_length, arguments.min_reference_length)
    kept = filter_rows(tqdm(rows, desc="Measuring", unit=" rows"), filters, length, prepared)
    prepared.read = len(rows)
    if not kept:
        raise DataError(f"No row is left after the filters, which dropped {dict(prepared.dropped)}. Loosen them.")
    if arguments.task not in _TRAINED_ON:
        prepared.splits["test"] = kept
        return prepared
    # Dolly's published order is that of the authors' split
    seed = None if arguments.task == "dolly" else arguments.seed
    return split_rows(kept, arguments.validation_rows, arguments.test_rows, seed, prepared)


def _read(arguments: PreparationArguments) -> list[Row]:
    source = arguments.source or _HUB_NAMES[arguments.task]
    options = {"split": arguments.dataset_split, "dataset_config": arguments.dataset_config}
    if arguments.task == "text":
        return load_corpus(source, **options).to_list()
    if arguments.task == "examples":
        return _read_examples(source, options)
    if arguments.task == "vicuna":
        instructions = read_vicuna(source, arguments.answers)
    elif arguments.task == "sni" and (Path(source) / "tasks").is_dir():
        with tqdm(desc="Reading", unit=" tasks") as bar:
            instructions = read_natural_instructions(Path(source), arguments.instances_per_task, bar.update)
    else:
        instructions = read_instructions(source, **options)
    return [_row(each, arguments.template) for each in instructions]


def _row(each: Instruction, template: Literal["alpaca", "chat"]) -> Row:
    return {
        "prompt": make_prompt(each.instruction, each.context, template),
        "completion": make_completion(each.references[0], template),
        "references": each.references,
        "instruction": each.instruction,
        "input": each.context,
        "category": each.category,
        "row": each.row,
    }


def _read_examples(source: str, options: dict[str, Any]) -> list[Row]:
    table = read_table(source, options["split"], options["dataset_config"], None)
    if "prompt" in table.columns or "messages" not in table.columns:
        return load_examples(source, **options).to_list()
    return [_turns(messages, table, index) for index, messages in enumerate(table.columns["messages"])]


def _turns(messages: Any, table: Table, index: int) -> Row:
    """The last message is the completion, all before it the prompt."""
    roles = [each.get("role") if isinstance(each, dict) else None for each in messages or []]
    texts = all(isinstance(each, dict) and isinstance(each.get("content"), str) for each in messages or [])
    if len(roles) < 2 or roles[-1] != "assistant" or not texts:
        raise DataError(
            f"{table.place(index)}: field 'messages' has the roles {roles}. Make it a list of messages with texts, of "
            "which the last is the assistant's."
        )
    messages = [{"role": each["role"], "content": each["content"]} for each in messages]
    return {"prompt": messages[:-1], "completion": messages[-1:], "references": [messages[-1]["content"]]}


def _is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    path = folder / "statistics.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output_dir={folder} holds other files. Name another folder.")
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    different = [name for name in settings if found.get(name) != settings[name]]
    if not different:
        return True
    if not overwrite:
        name = different[0]
        raise ValueError(
            f"output_dir={folder} was prepared with {name}={found.get(name)!r}, now it is {settings[name]!r}. Name "
            "another folder, or set overwrite=true."
        )
    print(f"Replacing {folder}", file=sys.stderr)
    return False


def _is_file(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
