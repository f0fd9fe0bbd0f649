"""A teacher whose scores of given completions are on disk: computed once, read by training runs without the teacher.

A folder has `settings.json`, with everything that the scores depend on, and files `scores-<first row>.safetensors`.
Each file has the tokens of `ROWS_OF_FILE` rows and the [`TopK`] of their completions' tokens, as a server's answer has
them. A file is complete or absent, so an interrupted command resumes with the first file that is missing.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..files.json_files import read_json
from ..files.result_folder import ResultFolder
from ..files.whole_files import write_whole
from ..models.encoding import encode_after_prompt
from .identity import Scoring, ServerIdentity, check_tokenizer
from .protocol import MessageError, Row, encode_rows, encode_scored_rows
from .remote_teacher import ServedTeacher
from .top_k import TopK

if TYPE_CHECKING:
    from ..config import MiniLLMConfig
    from .service import TeacherService

ROWS_OF_FILE = 64
_REMEDY = "Name another folder, or delete this one."
_RESUME = "Run the same `minillm-trl offline-teacher` command again to complete it."


class _Settings(TypedDict):
    teacher: dict[str, Any]  # a ServerIdentity
    data: str  # digest of the rows' tokens
    rows: int
    top_k: int
    temperature: float
    vocab_size: int
    max_completion_length: int


def given_rows(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_completion_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """Yield the tokens of prompts and given completions as training with `lmbda` below 1 sees them.

    Raises:
        UserError: for a row without a completion.
    """
    for example in examples:
        if not example.get("completion"):
            raise UserError(f"The row with the prompt {str(example['prompt'])[:80]!r} has no completion to score.")
        prompt, completion = example["prompt"], example["completion"]
        start, ids = encode_after_prompt(tokenizer, prompt, completion, chat_template_kwargs)
        yield Row(ids[:start], ids[start:][:max_completion_length])


def store_scores(
    service: "TeacherService",
    rows: Sequence[Row],
    folder: Path,
    *,
    top_k: int,
    temperature: float,
    vocab_size: int,
    max_completion_length: int,
    on_rows: Callable[[int], object] = lambda count: None,
) -> None:
    """Score rows and write them to a folder, or complete the folder of an interrupted run.

    Args:
        service ([`TeacherService`]): the teacher.
        rows (`Sequence[Row]`): prompts and completions.
        folder (`Path`): the folder.
        top_k, temperature, vocab_size: as in [`TeacherService.score`].
        max_completion_length (`int`): the limit at which the completions were cut, for the settings.
        on_rows (`Callable`, *optional*): called with the number of rows of each file that is done.

    Raises:
        UserError: if the folder has other scores, or a row cannot be scored.
    """
    settings: _Settings = {
        "teacher": service.identity.to_json(),
        "data": hashlib.sha256(encode_rows(rows)).hexdigest(),
        "rows": len(rows),
        "top_k": top_k,
        "temperature": temperature,
        "vocab_size": vocab_size,
        "max_completion_length": max_completion_length,
    }
    results = ResultFolder(folder, dict(settings), "scores that were computed", _REMEDY)
    try:
        service.check(rows, vocab_size)
    except MessageError as error:
        raise UserError(f"The teacher {service.identity.name} cannot score the data: {error}.") from error
    results.put("settings", results.settings)
    for start in range(0, len(rows), ROWS_OF_FILE):
        part, path = rows[start : start + ROWS_OF_FILE], _file(folder, start)
        if not path.is_file():
            top = service.score(part, top_k, temperature, vocab_size)
            write_whole(path, encode_scored_rows(part, top))
        on_rows(len(part))


def _file(folder: Path, start: int) -> Path:
    return folder / f"scores-{start:08d}.safetensors"


class _Place(NamedTuple):
    """Where the scores of a row are: its file, and its tokens among those of the file."""

    path: Path
    start: int
    stop: int


class StoredScores:
    """The scores in a folder, by the tokens of prompt and completion.

    Args:
        folder (`Path`): a folder of [`store_scores`].

    Raises:
        UserError: if the folder has no scores, or is incomplete or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "settings.json").is_file():
            raise UserError(
                f"offline_teacher={str(folder)!r} has no scores of a teacher (no settings.json). Make them with "
                "`minillm-trl offline-teacher --output_dir`."
            )
        self.settings: _Settings = read_json(folder / "settings.json", _Settings, _REMEDY)
        self.identity = ServerIdentity.from_json(self.settings["teacher"])
        self._places: dict[bytes, _Place] = {}
        for start in range(0, self.settings["rows"], ROWS_OF_FILE):
            self._index(_file(folder, start))

    def _index(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"offline_teacher={str(self.folder)!r} is incomplete: {path.name} is missing. {_RESUME}")
        with _opened(path) as file:
            tokens, lengths = file.get_tensor("tokens").tolist(), file.get_tensor("lengths").tolist()
        first = stored = 0
        for prompt, completion in lengths:
            row = Row(tokens[first : first + prompt], tokens[first + prompt : first + prompt + completion])
            self._places[_key(row)] = _Place(path, stored, stored + completion)
            first, stored = first + prompt + completion, stored + completion

    def has(self, row: Row) -> bool:
        """Return whether a row has scores."""
        return _key(row) in self._places

    def score(self, rows: Sequence[Row], scoring: Scoring) -> list[torch.Tensor]:
        """Return the packed [`TopK`] `(t, 2K + 1)` of each row, as a pool of servers does.

        Raises:
            UserError: for a row without scores.
        """
        found = []
        for row in rows:
            place = self._places.get(_key(row))
            if place is None:
                raise UserError(
                    f"offline_teacher={str(self.folder)!r} has no scores of a completion of {len(row.completion)} "
                    f"tokens after a prompt of {len(row.prompt)}. Only completions of the scored data have any: "
                    "evaluate checkpoints later, with minillm-trl evaluate."
                )
            with _opened(place.path) as file:
                ids, logps, rest = (
                    file.get_slice(name)[place.start : place.stop] for name in ("ids", "logps", "rest")
                )
            found.append(TopK(ids.long(), logps, rest).pack())
        return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it. {_RESUME}") from error


def _key(row: Row) -> bytes:
    return hashlib.sha256(encode_rows([row])).digest()


@dataclass(frozen=True)
class OfflineTeacher(ServedTeacher):
    """A teacher of which only stored scores are known.

    Args:
        pool ([`StoredScores`]): takes the place of the servers.
        identity, top_k, temperature: as in [`ServedTeacher`], those of the stored scores.
    """

    pool: Any

    @classmethod
    def open(cls, args: "MiniLLMConfig") -> "OfflineTeacher":
        """Open the folder of a configuration.

        Raises:
            UserError: if its scores have another temperature or length limit.
        """
        assert args.offline_teacher is not None, "the configuration names no folder"
        pool = StoredScores(Path(args.offline_teacher))
        for name in ("temperature", "max_completion_length"):
            stored, wanted = pool.settings[name], getattr(args, name)
            if stored != wanted:
                raise UserError(
                    f"{name}={wanted}, but the scores in offline_teacher={args.offline_teacher!r} were computed with "
                    f"{name}={stored}. Set {name}={stored}, or compute them again."
                )
        return cls(pool, pool.identity, pool.settings["top_k"], args.temperature, "teacher")

    def check(self, tokenizer: PreTrainedTokenizerBase, conversational: bool) -> None:
        """Check that the tokenizers are the same.

        Raises:
            UserError: with the first difference.
        """
        assert self.identity.tokenizer is not None  # `store_scores` writes it
        check_tokenizer(tokenizer, self.identity.tokenizer, str(self.pool.folder), conversational)

    def check_data(
        self,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_completion_length: int,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Check that each row of the training data has scores.

        Raises:
            UserError: naming the first row without.
        """
        for number, row in enumerate(given_rows(examples, tokenizer, max_completion_length, chat_template_kwargs)):
            if not self.pool.has(row):
                raise UserError(
                    f"offline_teacher={str(self.pool.folder)!r} has no scores of row {number} of the training data, "
                    f"with the prompt {str(examples[number]['prompt'])[:80]!r}. Train on the data that was scored, or "
                    "score this data."
                )

    def shared_vocab_size(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of leading vocabulary rows over which the scores are normalised.

        Raises:
            UserError: if student and teacher share another number of rows.
        """
        size, stored = super().shared_vocab_size(student, tokenizer), self.pool.settings["vocab_size"]
        if size != stored:
            raise UserError(
                f"Student and teacher share {size} rows of the vocabulary, but the scores in {self.pool.folder} are "
                f"over {stored}. Compute them again with --model set to this student."
            )
        return size
