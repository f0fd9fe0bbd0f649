"""Filter and split examples, count the dropped rows, and write a folder that every subcommand reads."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..files.messages import DataError, shortened
from ..files.whole_files import whole_folder, writing
from ..models.encoding import encode_prompts
from .templates import is_empty, message_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Filters:
    """Which rows to keep, by kind and by length in tokens.

    Attributes:
        categories (`Sequence[str]`, *optional*): the categories of instructions to keep.
        context (`"with"` or `"without"`, *optional*): keep only instructions with a context, or without.
        max_prompt_length (`int`, *optional*): maximum length of a prompt.
        max_length (`int`, *optional*): maximum length of prompt, completion and EOS together.
        min_reference_length (`int`, *optional*): minimum length of the first reference, as for the paper's subset
            [11, inf) of S-NI and UnNI.
    """

    categories: Sequence[str] | None = None
    context: Literal["with", "without"] | None = None
    max_prompt_length: int | None = None
    max_length: int | None = None
    min_reference_length: int | None = None


@dataclass
class Prepared:
    """Rows by split, the number of dropped rows by reason, and the number of rows read."""

    splits: dict[str, list[Row]]
    dropped: Counter = field(default_factory=Counter)
    read: int = 0


class Length(Protocol):
    """Return the length of a text or a conversation, in tokens or characters (see [`token_counter`])."""

    def __call__(self, value: Any, is_answer: bool = False) -> int: ...


def token_counter(
    tokenizer: "PreTrainedTokenizerBase | None", chat_template_kwargs: dict[str, Any] | None = None
) -> Length:
    """Return a function that measures lengths in tokens, or in characters without a tokenizer.

    Conversations are measured through the chat template. Answers (completions and references) are counted without
    special tokens and without the template, because the prompt before them has those already.
    """

    def length(value: Any, is_answer: bool = False) -> int:
        if tokenizer is None:
            return len(message_text(value))
        if is_answer:
            return len(tokenizer(message_text(value), add_special_tokens=False)["input_ids"])
        if not isinstance(value, str) and tokenizer.chat_template is None:
            raise DataError(
                f"prompts are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template to "
                "measure them with. Use a tokenizer that has one, or write the prompts as text."
            )
        return len(encode_prompts(tokenizer, [value], chat_template_kwargs)[0])

    return length


def filter_rows(rows: Iterable[Row], filters: Filters, length: Length, prepared: Prepared) -> list[Row]:
    """Drop rows of other kinds, empty completions, rows that are too long or too short, and repeated rows.

    Args:
        rows (`Iterable[dict]`): have `prompt` and may have `completion` and `references`; instructions also have
            `category` and `input`.
        filters ([`Filters`]): the kinds and limits.
        length ([`Length`]): from [`token_counter`].
        prepared ([`Prepared`]): its counts are updated in place.
    """
    kept: list[Row] = []
    seen: set[str] = set()
    for row in rows:
        reason = _reason_to_drop(row, filters, length)
        if reason is None:
            key = json.dumps([row["prompt"], row.get("completion")], sort_keys=True)
            reason = "repeats an earlier row" if key in seen else None
            seen.add(key)
        if reason is None:
            kept.append(row)
        else:
            prepared.dropped[reason] += 1
        prepared.read += 1
    return kept


def _reason_to_drop(row: Row, filters: Filters, length: Length) -> str | None:
    completion, references = row.get("completion"), row.get("references")
    if filters.categories is not None and row["category"] not in filters.categories:
        return "category is another"
    if filters.context is not None and bool(row["input"]) != (filters.context == "with"):
        return "has no context" if filters.context == "with" else "has a context"
    if is_empty(completion):
        return "completion is empty"
    prompt_length = length(row["prompt"])
    if filters.max_prompt_length is not None and prompt_length > filters.max_prompt_length:
        return f"prompt has more than {filters.max_prompt_length} tokens"
    whole = prompt_length + (0 if completion is None else length(completion, True) + 1)  # +1 for EOS
    if filters.max_length is not None and whole > filters.max_length:
        return f"prompt and completion have more than {filters.max_length} tokens"
    shortest = filters.min_reference_length
    if shortest is not None and references and length(references[0], True) < shortest:
        return f"reference has fewer than {shortest} tokens"
    return None


def split_rows(
    rows: Sequence[Row], validation_rows: int, test_rows: int, seed: int | None, prepared: Prepared
) -> Prepared:
    """Split rows into test (the first `test_rows`), validation (the next `validation_rows`) and train (the rest).

    No prompt is in two splits: the rows of a prompt that an earlier split has (in the order test, validation, train)
    are dropped.

    Args:
        rows (`Sequence[dict]`): from [`filter_rows`].
        validation_rows, test_rows (`int`): sizes before such rows are dropped.
        seed (`int`, *optional*): order the rows by the SHA-256 of seed and prompt first, so that the split of a prompt
            does not depend on the order of the source. Without a seed, keep the order of the source.
        prepared ([`Prepared`]): its splits and counts are updated in place.

    Raises:
        DataError: if the training split, or a requested split, would be empty.
    """
    if seed is not None:
        rows = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{_prompt_key(row)}".encode()).digest())
    if len(rows) <= validation_rows + test_rows:
        raise DataError(
            f"{len(rows)} rows remain after the filters; validation_rows={validation_rows} and "
            f"test_rows={test_rows} leave no rows to train on. Lower them, or check what the filters dropped: "
            f"{dict(prepared.dropped) or 'nothing'}."
        )
    cuts = {"test": (0, test_rows), "validation": (test_rows, test_rows + validation_rows)}
    cuts["train"] = (test_rows + validation_rows, len(rows))
    taken: dict[str, str] = {}
    for split, (start, stop) in cuts.items():
        prepared.splits[split] = []
        for row in rows[start:stop]:
            if (other := taken.setdefault(_prompt_key(row), split)) == split:
                prepared.splits[split].append(row)
            else:
                prepared.dropped[f"{split}: its prompt is in {other}"] += 1
        if stop > start and not prepared.splits[split]:
            raise DataError(
                f"The split {split!r} is empty: the prompts of all its {stop - start} rows are in earlier splits. "
                f"{len(rows)} rows remain after the filters, with {len(set(map(_prompt_key, rows)))} different "
                "prompts. Change test_rows and validation_rows, or add rows with other prompts."
            )
    return prepared


def _prompt_key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def statistics(prepared: Prepared, length: Length) -> dict[str, Any]:
    """Return the number of rows read and dropped (by reason), and each split's size and length quantiles."""

    def quantiles(values: list[int]) -> dict[str, float]:
        return {f"{quantile:.0%}": float(np.quantile(values, quantile)) for quantile in QUANTILES}

    splits: dict[str, dict[str, Any]] = {}
    for split, rows in prepared.splits.items():
        if not rows:
            continue
        splits[split] = {"rows": len(rows)}
        # in rows with a prompt, `text` is just another column
        for name in ("prompt", "completion") if "prompt" in rows[0] else ("text",):
            values = [length(row[name], name == "completion") for row in rows if row.get(name) is not None]
            if values:
                splits[split][f"{name}_length"] = quantiles(values)
        if "prompt" in rows[0]:
            splits[split]["different_prompts"] = len(set(map(_prompt_key, rows)))
    return {"rows_read": prepared.read, "dropped": dict(prepared.dropped), "splits": splits}


def format_statistics(stats: dict[str, Any], unit: str) -> str:
    """Format the statistics as a table for a terminal."""
    lines = [f"{stats['rows_read']} rows read"]
    lines += [f"  dropped {count}: {reason}" for reason, count in stats["dropped"].items()]
    head = [f"{quantile:.0%}" for quantile in QUANTILES]
    lines.append(f"{'':<24}{'rows':>8}" + "".join(f"{name:>8}" for name in head) + f"   length in {unit}")
    for split, counts in stats["splits"].items():
        for name in ("prompt", "completion", "text"):
            if (values := counts.get(f"{name}_length")) is not None:
                cells = "".join(f"{value:>8.0f}" for value in values.values())
                lines.append(f"{f'{split}, {name}':<24}{counts['rows']:>8}{cells}")
    return "\n".join(lines)


def own_names() -> set[str]:
    """Return the names of all files that we write to a prepared folder, including a recipe's marker."""
    return {f"{split}.jsonl" for split in SPLITS} | {"statistics.json", "stage.json"}


def write_prepared(folder: Path, prepared: Prepared, record: dict[str, Any]) -> None:
    """Write `<split>.jsonl` and `statistics.json` to a folder atomically.

    Args:
        folder (`Path`): replaced if it exists.
        prepared ([`Prepared`]): the rows.
        record (`dict`): content of `statistics.json`.

    Raises:
        FileError: if the folder cannot be written.
    """
    with writing(folder), whole_folder(folder) as partial:
        for split, rows in prepared.splits.items():
            if rows:
                with open(partial / f"{split}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(_json_line(row) for row in rows)
        (partial / "statistics.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def _json_line(row: Row) -> str:
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise DataError(
                f"Field {name!r} is {shortened(value)}, which JSON cannot hold ({error}). Drop the column from the "
                "source, or make it text."
            ) from error
    return json.dumps(row, ensure_ascii=False) + "\n"
