"""Filters examples, splits them, counts what happened, and writes a folder that every subcommand reads."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..files.messages import DataError, shortened
from ..files.whole_files import writing
from ..models.encoding import encode_prompts
from .templates import is_empty, message_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Filters:
    """Which rows are dropped.

    Attributes:
        max_prompt_length (`int`, *optional*): tokens that a prompt may have.
        max_length (`int`, *optional*): tokens that prompt, completion and end-of-sequence token may have together.
        min_reference_length (`int`, *optional*): tokens that the first reference must have, as for the paper's
            subset [11, inf) of S-NI and UnNI.
    """

    max_prompt_length: int | None = None
    max_length: int | None = None
    min_reference_length: int | None = None


@dataclass
class Prepared:
    """Rows by split, and what was dropped on the way, by reason."""

    splits: dict[str, list[Row]]
    dropped: Counter = field(default_factory=Counter)
    read: int = 0


class Length(Protocol):
    """Measures a text or a conversation."""

    def __call__(self, value: Any, is_answer: bool = False) -> int: ...


def token_counter(
    tokenizer: "PreTrainedTokenizerBase | None", chat_template_kwargs: dict[str, Any] | None = None
) -> Length:
    """The function that measures lengths: in tokens, a conversation through the chat template; else in characters.

    Answers (completions and references) are counted without the tokenizer's special tokens and without the template's:
    they follow a prompt, which has them.
    """

    def length(value: Any, is_answer: bool = False) -> int:
        if tokenizer is None:
            return len(message_text(value))
        if is_answer:
            return len(tokenizer(message_text(value), add_special_tokens=False)["input_ids"])
        if not isinstance(value, str) and tokenizer.chat_template is None:
            raise DataError(
                f"prompts are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template to "
                "measure them with. Name one that has, or write the prompts as text."
            )
        return len(encode_prompts(tokenizer, [value], chat_template_kwargs)[0])

    return length


def filter_rows(rows: Iterable[Row], filters: Filters, length: Length, prepared: Prepared) -> list[Row]:
    """Drop empty completions, rows that are too long or whose reference is too short, and repeated rows.

    Args:
        rows (`Iterable[dict]`): with `prompt` and, where they have one, `completion` and `references`.
        filters ([`Filters`]): limits.
        length ([`Length`]): from [`token_counter`].
        prepared ([`Prepared`]): counts are added to it.
    """
    kept, seen = [], set()
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
    if is_empty(completion):
        return "completion is empty"
    prompt_length = length(row["prompt"])
    if filters.max_prompt_length is not None and prompt_length > filters.max_prompt_length:
        return f"prompt has more than {filters.max_prompt_length} tokens"
    whole = prompt_length + (0 if completion is None else length(completion, True) + 1)  # the end-of-sequence token
    if filters.max_length is not None and whole > filters.max_length:
        return f"prompt and completion have more than {filters.max_length} tokens"
    shortest = filters.min_reference_length
    if shortest is not None and references and length(references[0], True) < shortest:
        return f"reference has fewer than {shortest} tokens"
    return None


def split_rows(
    rows: Sequence[Row], validation_rows: int, test_rows: int, seed: int | None, prepared: Prepared
) -> Prepared:
    """Split into the first `test_rows`, the next `validation_rows`, and the rest, without a prompt in two of them.

    Args:
        rows (`Sequence[dict]`): from [`filter_rows`].
        validation_rows, test_rows (`int`): sizes.
        seed (`int`, *optional*): with one, rows are first ordered by the SHA-256 of seed and prompt, so that the split
            of a prompt does not depend on the other rows' order; without, the order is that of the source.
        prepared ([`Prepared`]): counts are added to it. Of a prompt in two parts, the rows in the later one (of test,
            validation, train) are dropped.

    Raises:
        DataError: if no row is left to train on, or for a part that was asked for.
    """
    if seed is not None:
        rows = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{_prompt_key(row)}".encode()).digest())
    if len(rows) <= validation_rows + test_rows:
        raise DataError(
            f"{len(rows)} rows are left after the filters, of which validation_rows={validation_rows} and "
            f"test_rows={test_rows} leave none to train on. Lower them, or look at what the filters dropped: "
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
                f"The split {split!r} is left empty: the prompts of its {stop - start} rows are all in the splits "
                f"before it. {len(rows)} rows are left after the filters, with {len(set(map(_prompt_key, rows)))} "
                "different prompts. Change test_rows and validation_rows, or add rows with other prompts."
            )
    return prepared


def _prompt_key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def statistics(prepared: Prepared, length: Length) -> dict[str, Any]:
    """Rows read, dropped by reason and kept, and quantiles of the lengths of each split."""

    def quantiles(values: list[int]) -> dict[str, float]:
        return {f"{quantile:.0%}": float(np.quantile(values, quantile)) for quantile in QUANTILES}

    splits = {}
    for split, rows in prepared.splits.items():
        if not rows:
            continue
        splits[split] = {"rows": len(rows)}
        # beside a prompt, `text` is a column that is kept and not read
        for name in ("prompt", "completion") if "prompt" in rows[0] else ("text",):
            values = [length(row[name], name == "completion") for row in rows if row.get(name) is not None]
            if values:
                splits[split][f"{name}_length"] = quantiles(values)
        if "prompt" in rows[0]:
            splits[split]["different_prompts"] = len(set(map(_prompt_key, rows)))
    return {"rows_read": prepared.read, "dropped": dict(prepared.dropped), "splits": splits}


def format_statistics(stats: dict[str, Any], unit: str) -> str:
    """The statistics as a table for a terminal."""
    lines = [f"{stats['rows_read']} rows read"]
    lines += [f"  dropped {count}: {reason}" for reason, count in stats["dropped"].items()]
    head = [f"{quantile:.0%}" for quantile in QUANTILES]
    lines.append(f"{'':<24}{'rows':>8}" + "".join(f"{name:>8}" for name in head) + f"   length in {unit}")
    for split, each in stats["splits"].items():
        for name in ("prompt", "completion", "text"):
            if (values := each.get(f"{name}_length")) is not None:
                cells = "".join(f"{value:>8.0f}" for value in values.values())
                lines.append(f"{f'{split}, {name}':<24}{each['rows']:>8}{cells}")
    return "\n".join(lines)


def own_names() -> set[str]:
    """The names that prepared folders have in them; a recipe's marker is written to them too."""
    return {f"{split}.jsonl" for split in SPLITS} | {"statistics.json", "stage.json"}


def write_prepared(folder: Path, prepared: Prepared, record: dict[str, Any]) -> None:
    """Write `<split>.jsonl` and `statistics.json`; the folder is there whole or not at all.

    Args:
        folder (`Path`): takes the place of what was there.
        prepared ([`Prepared`]): the rows.
        record (`dict`): what `statistics.json` holds.

    Raises:
        FileError: if it cannot be written.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        for split, rows in prepared.splits.items():
            if rows:
                with open(partial / f"{split}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(_json_line(row) for row in rows)
        (partial / "statistics.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)


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
