"""`minillm-trl prepare-data`: check, filter and split data, and write it in the form that all subcommands read."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from tqdm.auto import tqdm

from .. import __version__
from ..data import DataError
from ..data.prepare import (
    Filters,
    Length,
    Prepared,
    Row,
    filter_rows,
    format_statistics,
    own_names,
    split_rows,
    statistics,
    token_counter,
    write_prepared,
)
from ..errors import UserError
from ..files.json_files import read_json
from ..files.messages import listing, nearest, shortened
from .arguments import Parser, make_parser, parse
from .option_values import json_object

Task = Literal["dolly", "selfinst", "vicuna", "sni", "unni", "instructions", "examples", "text"]
_SPLIT = ("dolly", "instructions", "examples")  # the others are test sets only; text is for training only
_HUB_NAMES = {"dolly": "databricks/databricks-dolly-15k"}
_DOLLY_ROWS = {"validation_rows": 1000, "test_rows": 500}
_LIMITS = ("max_prompt_length", "max_length", "min_reference_length")
_KINDS = ("categories", "context")
_EXAMPLE_COLUMNS = ("prompt_column", "completion_column", "references_column")
_INSTANCES_PER_TASK = 100


@dataclass
class PreparationArguments:
    """Source, filters, split and output folder."""

    task: str = field(
        metadata={
            "help": "dolly, selfinst, vicuna, sni or unni: the paper's data; instructions: any table with a column "
            "`instruction`; examples: any table with `prompt` or `messages`; text: plain text for L_PT."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for <split>.jsonl and statistics.json."})
    source: str | None = field(
        default=None,
        metadata={"help": "File, folder or name on the hub (dolly: default databricks/databricks-dolly-15k)."},
    )
    answers: str | None = field(default=None, metadata={"help": "vicuna: the file of answers."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the hub, or of a folder."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Keep this many rows, drawn by `seed`; default: all."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "examples: column of prompts, default `prompt`."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "examples: column of completions, default `completion`."}
    )
    references_column: str | None = field(
        default=None, metadata={"help": "examples: column of references, default `references`."}
    )
    text_column: str | None = field(default=None, metadata={"help": "text: column of texts, default `text`."})
    instances_per_task: int | None = field(
        default=None, metadata={"help": "sni, from its repository: rows of each task; default: 100."}
    )
    template: Literal["alpaca", "chat"] | None = field(
        default=None,
        metadata={
            "help": "Template of instructions: alpaca, as in the paper (default), or chat, a conversation. "
            "`examples` keeps text prompts unchanged by default."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer to count lengths with; characters without one."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template, as JSON."}
    )
    categories: list[str] | None = field(
        default=None, metadata={"help": "Keep only instructions of these categories, such as closed_qa of Dolly."}
    )
    context: Literal["with", "without"] | None = field(
        default=None, metadata={"help": "Keep only instructions with a context (an input), or without."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Drop rows whose prompt has more tokens (the paper's code: 256)."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Drop rows with more tokens in total (the paper's code keeps them; training truncates)."},
    )
    min_reference_length: int | None = field(
        default=None, metadata={"help": "Drop rows whose reference has fewer tokens (11 for the paper's [11, inf))."}
    )
    validation_rows: int | None = field(
        default=None, metadata={"help": "Rows for validation (default: 1000 for dolly, else 0)."}
    )
    test_rows: int | None = field(
        default=None, metadata={"help": "Rows for testing (default: 500 for dolly, else 0)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split and of the choice of `max_rows`."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a folder that was prepared with other settings."}
    )

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            known = ", ".join(get_args(Task))
            raise UserError(f"task={self.task!r} is not one of {known}.{nearest(self.task, get_args(Task))}")
        if self.source is None and self.task not in _HUB_NAMES:
            raise UserError(f"task={self.task!r} needs source: a file, a folder or a name on the hub.")
        if (self.answers is None) == (self.task == "vicuna"):
            raise UserError("answers is the file with the answers to Vicuna's questions: give it with task=vicuna.")
        self._refuse_options_of_other_tasks()
        for name in (*_LIMITS, "max_rows", "instances_per_task"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.tokenizer is None and any(getattr(self, name) is not None for name in _LIMITS):
            raise UserError(f"{' and '.join(_LIMITS)} count tokens: set tokenizer (a model's name or folder).")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json_object(self.chat_template_kwargs)
        if self.tokenizer is None and self.chat_template_kwargs is not None:
            raise UserError("chat_template_kwargs is for measuring conversations in tokens: set tokenizer.")
        for name in _DOLLY_ROWS:
            if getattr(self, name) is None:
                setattr(self, name, _DOLLY_ROWS[name] if self.task == "dolly" else 0)
            elif getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}.")
        # set for tasks without them too: statistics.json records them, and reruns are compared with it
        self.instances_per_task = self.instances_per_task or _INSTANCES_PER_TASK
        self.template = self.template or (None if self.task == "examples" else "alpaca")

    def _refuse_options_of_other_tasks(self) -> None:
        reasons = dict.fromkeys(_EXAMPLE_COLUMNS, "task=examples") if self.task != "examples" else {}
        if self.task != "text":
            reasons["text_column"] = "task=text"
        else:
            reasons |= dict.fromkeys(_LIMITS, "data with prompts and completions")
        if self.task in ("examples", "text"):
            reasons |= dict.fromkeys(_KINDS, "instructions")
        if self.task == "text":
            reasons["template"] = "instructions and examples"
        if self.task not in _SPLIT:
            kind = "for training" if self.task == "text" else "a test set"
            reasons |= dict.fromkeys(_DOLLY_ROWS, f"data to split, and this is all {kind}")
        if self.task == "vicuna" or self.is_repository:
            reasons["dataset_config"] = "a dataset on the hub"
        if not self.is_repository:
            reasons["instances_per_task"] = "task=sni from a clone of its repository"
        for name, place in reasons.items():
            if getattr(self, name) is not None:
                raise UserError(f"{name} has no meaning for {self.task}: it is for {place}. Leave it out.")

    @property
    def is_repository(self) -> bool:
        """Return whether the source is a clone of Super-NaturalInstructions."""
        return self.task == "sni" and (Path(str(self.source)).expanduser() / "tasks").is_dir()

    def files(self) -> dict[str, list[Path]]:
        """Return the local files to read, by source name."""
        from ..data.corpus import corpus_files
        from ..data.instructions import natural_instructions_files
        from ..data.load import local_files

        found = {}
        for name in filter(None, (self.source, self.answers)):
            if self.is_repository:
                found[name] = natural_instructions_files(Path(name).expanduser())
            elif self.task == "text":
                found[name] = corpus_files(name, self.dataset_split)
            else:
                found[name] = local_files(name, "train" if self.task == "vicuna" else self.dataset_split)
        return {name: files for name, files in found.items() if files}


class _Record(TypedDict):
    """The fields of `statistics.json` that are read here."""

    settings: dict[str, Any]
    splits: dict[str, Any]


def build_parser() -> Parser:
    """Return the parser of the subcommand."""
    return make_parser("prepare-data", (PreparationArguments,), __doc__)


def run(argv: list[str]) -> int:
    """Parse the arguments, read and check the data, and write the folder unless it is up to date."""
    (arguments,), launch = parse(build_parser(), argv)
    if launch:
        raise UserError(f"{next(iter(launch))}: prepare-data runs in one process. Leave it out.")
    folder = Path(arguments.output_dir)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output_dir", "overwrite")}
    settings["sha256"] = {name: _sha256(files) for name, files in arguments.files().items()}
    if _is_done(folder, settings, arguments.overwrite):
        print(f"{folder} is up to date: prepared with these settings before.")
        return 0
    tokenizer = None
    if arguments.tokenizer is not None:
        from ..models.loading import read_tokenizer  # torch takes seconds to import, and only tokenizers need it

        tokenizer = read_tokenizer(arguments.tokenizer)
    length = token_counter(tokenizer, arguments.chat_template_kwargs)
    prepared = _prepare(arguments, length)
    stats = statistics(prepared, length)
    unit = "characters" if tokenizer is None else "tokens"
    record = {"settings": settings, "version": __version__, "length_unit": unit, **stats}
    write_prepared(folder, prepared, record)
    print(format_statistics(stats, unit))
    print(f"Written to {folder}")
    return 0


def _prepare(arguments: PreparationArguments, length: Length) -> Prepared:
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
    _check_categories(arguments, rows)
    filters = Filters(**{name: getattr(arguments, name) for name in (*_KINDS, *_LIMITS)})
    kept = filter_rows(tqdm(rows, desc="Measuring", unit=" rows"), filters, length, prepared)
    if not kept:
        source = arguments.source or _HUB_NAMES[arguments.task]
        raise DataError(f"{source}: no row is left after the filters: {dict(prepared.dropped)}. Loosen them.")
    if arguments.task not in _SPLIT:
        prepared.splits["test"] = kept
        return prepared
    assert arguments.validation_rows is not None  # set by __post_init__, as the next one
    assert arguments.test_rows is not None
    # the authors split Dolly in its published order
    seed = None if arguments.task == "dolly" else arguments.seed
    return split_rows(kept, arguments.validation_rows, arguments.test_rows, seed, prepared)


def _check_categories(arguments: PreparationArguments, rows: list[Row]) -> None:
    found = sorted({row["category"] for row in rows}) if arguments.categories is not None else []
    for category in arguments.categories or ():
        if category not in found:
            source = arguments.source or _HUB_NAMES[arguments.task]
            raise DataError(
                f"{source}: no row has the category {category!r}; the categories are {listing(found)}."
                f"{nearest(category, found)}"
            )


def _read(arguments: PreparationArguments) -> list[Row]:
    from ..data.instructions import read_instructions, read_natural_instructions, read_vicuna
    from ..data.rows import instruction_rows, read_example_rows, read_text_rows

    source = arguments.source or _HUB_NAMES[arguments.task]
    split, config = arguments.dataset_split, arguments.dataset_config
    if arguments.task == "text":
        return read_text_rows(source, arguments.text_column or "text", split=split, dataset_config=config)
    if arguments.task == "examples":
        named = {name.removesuffix("_column"): getattr(arguments, name) for name in _EXAMPLE_COLUMNS}
        columns = {role: name for role, name in named.items() if name is not None}
        return read_example_rows(source, columns, template=arguments.template, split=split, dataset_config=config)
    if arguments.task == "vicuna":
        assert arguments.answers is not None  # checked by __post_init__
        instructions = read_vicuna(source, arguments.answers)
    elif arguments.is_repository:
        assert arguments.instances_per_task is not None  # set by __post_init__
        with tqdm(desc="Reading", unit=" tasks") as bar:
            folder = Path(source).expanduser()
            instructions = read_natural_instructions(folder, arguments.instances_per_task, bar.update)
    else:
        instructions = read_instructions(source, split=split, dataset_config=config)
    assert arguments.template is not None  # set by __post_init__ for instructions
    return instruction_rows(instructions, arguments.template)


def _is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    path = folder / "statistics.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"output_dir={folder} holds other files. Name another folder.")
        return False
    record = read_json(path, _Record, "Name another output_dir, or remove this folder.")
    found = record["settings"]
    different = [name for name in settings if found.get(name) != settings[name]]
    missing = [f"{split}.jsonl" for split in record["splits"] if not (folder / f"{split}.jsonl").is_file()]
    if not different and not missing:
        return True
    if different and not overwrite:
        name = different[0]
        raise UserError(
            f"output_dir={folder} was prepared with {name}={shortened(found.get(name), 200)}, now it is "
            f"{shortened(settings[name], 200)}. Name "
            "another folder, or set overwrite=true."
        )
    if foreign := sorted({entry.name for entry in folder.iterdir()} - own_names()):
        raise UserError(
            f"output_dir={folder} would be replaced, but prepare-data did not write {listing(foreign)} in it. Move "
            "these files, or name another folder."
        )
    reason = "its settings differ" if different else f"{listing(missing)} is missing"
    print(f"Replacing {folder}: {reason}", file=sys.stderr)
    return False


def _sha256(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a file, or for several of their names and digests."""
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    named = [f"{path.name} {digest}\n" for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()
