"""Load prompts, completions and references from a file, a folder, the hub or the package, and check every row."""

import difflib
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .e2e import load_e2e
from .errors import DataError, shortened
from .readers import PlacedRow, read_rows

_ROLES = ("system", "user", "assistant", "tool", "developer")
_FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


def load_examples(
    source: str,
    *,
    split: str = "train",
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    references_column: str = "references",
    require_completion: bool = False,
    max_rows: int | None = None,
    dataset_config: str | None = None,
) -> Dataset:
    """Load a dataset and check every row before anything else is spent on it.

    Args:
        source (`str`): `"e2e"` for the data in the package; a `.jsonl`, `.json`, `.csv` or `.parquet` file (text formats
            also with `.gz`); a folder written by `save_to_disk` or holding `<split>.jsonl` and its like; else a dataset
            on the hub.
        split (`str`, *optional*, defaults to `"train"`): split of a folder, of the hub's dataset or of `"e2e"`.
        prompt_column, completion_column, references_column (`str`, *optional*): names of the columns in the source.
        require_completion (`bool`, *optional*, defaults to `False`): whether each row must have a completion.
        max_rows (`int`, *optional*): keep the first rows only.
        dataset_config (`str`, *optional*): configuration of a dataset on the hub.

    Returns:
        [`~datasets.Dataset`] with `prompt` (text, or a list of messages), `completion` of the same kind if the source has
        it, `references` (list of texts; the completion's text if the source has none), and all other columns.

    Raises:
        DataError: naming file and line (or row), field, value and fix.
    """
    rows = _load_rows(source, split, dataset_config)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    _require_column(prompt_column, columns, source, "prompt_column")
    if require_completion:
        _require_column(completion_column, columns, source, "completion_column")
    has_completion = completion_column in columns
    conversational = isinstance(rows[0][1].get(prompt_column), list)
    examples = []
    for place, row in rows[:max_rows]:
        example = {k: v for k, v in row.items() if k not in (prompt_column, completion_column, references_column)}
        example["prompt"] = _check_text(row.get(prompt_column), prompt_column, place, conversational)
        completion = row.get(completion_column)
        if has_completion and (require_completion or completion is not None):
            completion = _check_text(completion, completion_column, place, conversational)
        if has_completion:
            example["completion"] = completion
        references = row.get(references_column)
        if references is not None:
            example["references"] = _check_references(references, references_column, place)
        elif completion is not None:
            example["references"] = [completion if isinstance(completion, str) else completion[-1]["content"]]
        examples.append(example)
    return Dataset.from_list(examples)


def unique_prompts(dataset: Dataset) -> Dataset:
    """One row for each different prompt, in order of first appearance.

    Args:
        dataset ([`~datasets.Dataset`]): as from [`load_examples`].

    Returns:
        [`~datasets.Dataset`] with `prompt` and, where the rows have them, `references`: all different references of the
        prompt's rows, in order. On-policy training and evaluation want each prompt once.
    """
    grouped: dict[str, dict[str, Any]] = {}
    has_references = "references" in dataset.column_names
    for row in dataset:
        entry = grouped.setdefault(repr(row["prompt"]), {"prompt": row["prompt"]})
        if has_references:
            known = entry.setdefault("references", [])
            known.extend(text for text in dict.fromkeys(row["references"] or []) if text not in known)
    return Dataset.from_list(list(grouped.values()))


def check_prompt_lengths(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int, source: str
) -> None:
    """Check that every prompt fits.

    Args:
        dataset ([`~datasets.Dataset`]): with a column `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): conversations go through its chat template.
        max_prompt_tokens (`int`): longest prompt allowed: the models' context less the completion's limit.
        source (`str`): name of the dataset in the error.

    Raises:
        DataError: with the number of prompts that are too long, the first of them and its length.
    """
    too_long = []
    for index, prompt in enumerate(dataset["prompt"]):
        if isinstance(prompt, str):
            length = len(tokenizer(prompt)["input_ids"])
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            length = len(ids)
        if length > max_prompt_tokens:
            too_long.append((index, length))
    if too_long:
        index, length = too_long[0]
        raise DataError(
            f"{source}: {len(too_long)} of {len(dataset)} prompts are longer than the {max_prompt_tokens} tokens that are "
            f"left for a prompt; the first is row {index + 1} with {length} tokens: "
            f"{shortened(dataset[index]['prompt'])}. Lower max_completion_length, or drop long prompts."
        )


def _load_rows(source: str, split: str, dataset_config: str | None) -> list[PlacedRow]:
    path = Path(source)
    if source == "e2e":
        return _dataset_rows(_pick_split(load_e2e(), split, source), source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _dataset_rows(_pick_split(datasets.load_from_disk(source), split, source), source)
        candidates = [path / f"{split}{ending}" for ending in _FILE_ENDINGS]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise DataError(
                f"{source}: no {split}.jsonl (or .json, .csv, .parquet) in this folder, nor a saved dataset."
            )
        return read_rows(found)
    if path.is_file() or source.endswith(_FILE_ENDINGS):
        return read_rows(path)
    if path.suffix:
        return read_rows(path)  # says what is wrong with it
    try:
        dataset = datasets.load_dataset(source, dataset_config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source!r} is neither a local file or folder nor could it be loaded from the hub: {error}"
        ) from error
    return _dataset_rows(dataset, source)


def _dataset_rows(dataset: Dataset, source: str) -> list[PlacedRow]:
    if len(dataset) == 0:
        raise DataError(f"{source}: no rows.")
    return [(f"{source}: row {number}", row) for number, row in enumerate(dataset, start=1)]


def _pick_split(dataset: Dataset | DatasetDict, split: str, source: str) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise DataError(f"{source}: no split {split!r}; there are {sorted(dataset)}.")
    return dataset[split]


def _require_column(name: str, columns: list[str], source: str, option: str) -> None:
    if name in columns:
        return
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise DataError(f"{source}: no column {name!r}; there are {columns}.{hint} Set {option} to the right one.")


def _check_text(value: Any, field: str, place: str, conversational: bool) -> Any:
    kind = "a list of messages" if conversational else "a text"
    if conversational != isinstance(value, list) or not isinstance(value, str | list):
        raise DataError(
            f"{place}: {field} must be {kind} as in the first row, got {shortened(value)}. Mend or drop the row."
        )
    if not value or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place}: {field} is empty. Mend or drop the row.")
    if conversational:
        for number, message in enumerate(value, start=1):
            _check_message(message, f"{place}: {field}, message {number}")
    return value


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{place}: expected an object with role and content, got {shortened(message)}.")
    if message["role"] not in _ROLES:
        raise DataError(f"{place}: unknown role {message['role']!r}; known are {', '.join(_ROLES)}.")
    if not isinstance(message["content"], str):
        raise DataError(f"{place}: content must be a text, got {shortened(message['content'])}.")


def _check_references(value: Any, field: str, place: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: {field} must be a text or a list of texts, got {shortened(value)}.")
    return texts
