"""Load examples from a file, a folder or the hub, and pool their prompts for sampling and evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from ..files.messages import DataError, listing, nearest, shortened
from ..models.encoding import encode_prompts
from .conversations import MESSAGES, holds_whole_conversations, split_conversations
from .e2e import load_e2e
from .examples import check_examples, find_columns
from .files import EXTENSIONS, Table, plain_texts, read_file

# raised by `load_from_disk` if state.json or dataset_info.json were changed
_DAMAGE = (AttributeError, IndexError, KeyError, RecursionError, TypeError)
_REFERENCES = List(Value("string"))


@dataclass(frozen=True)
class Columns:
    """Names of columns in a source, as arguments of [`load_examples`], and whether every row needs a completion."""

    prompt: str = "prompt"
    completion: str = "completion"
    references: str = "references"
    require_completion: bool = False
    text: str | None = None

    def renamed(self, names: Mapping[str, str]) -> "Columns":
        """Return the columns with the names of a part of a mixture, such as `{"prompt_column": "question"}`."""
        return replace(
            self,
            prompt=names.get("prompt_column", self.prompt),
            completion=names.get("completion_column", self.completion),
            references=names.get("references_column", self.references),
        )


def load_examples(
    source: str | Path,
    *,
    split: str = "train",
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    references_column: str = "references",
    require_completion: bool = False,
    max_rows: int | None = None,
    dataset_config: str | None = None,
    text_column: str | None = None,
) -> Dataset:
    """Load and check prompts, with their completions and references if the source has them.

    A column `messages` in place of `prompt` (or the column that `prompt_column` names) may hold whole conversations,
    as in TRL: the last message, the assistant's, is the completion and the messages before it are the prompt.

    Args:
        source (`str` or `Path`): one of

            - `"e2e"`: the data that ships with this package, see [`load_e2e`] (for a folder of that name, `./e2e`);
            - a file: `.jsonl`, `.jsonl.gz`, `.json`, `.csv` or `.parquet`;
            - a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, or a folder that holds
              `<split>.jsonl` (or another of these formats);
            - the name of a dataset on the hub.
        split (`str`, *optional*, defaults to `"train"`): split of `"e2e"`, a folder or a hub dataset. A file, or a
            folder with a single saved `Dataset`, has no splits and is always loaded whole.
        prompt_column, completion_column, references_column (`str`, *optional*): the names in the source. `prompt` must
            exist, and so must every name other than the default.
        require_completion (`bool`, *optional*, defaults to `False`): refuse rows without a completion, as supervised
            training must.
        max_rows (`int`, *optional*): read only the first rows; later rows are not checked.
        dataset_config (`str`, *optional*): configuration of a hub dataset.
        text_column (`str`, *optional*): a column of plain text. If the source has this column and no prompts, only
            this column is returned.

    Returns:
        [`~datasets.Dataset`] with the columns

        - `prompt`: text, or a list of `{"role", "content"}` messages, the same kind in all rows;
        - `completion`: of the same kind, only if the source has completions; null where the source has null;
        - `references` (`list[str]`): the given references (a single text becomes a list of one), or else the text of
          the completion (of its first message). Only if the source has references or completions; `[]` where the
          completion is null and no references are given;
        - all other columns of the source, unchanged.

    Raises:
        DataError: if the source cannot be found or read, or a row cannot be used. The message names the file and line
            (the row, counting from 0, if the format has no lines), the field, the value and the fix.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"max_rows={max_rows} leaves no rows. Set it to at least 1, or to None for all rows.")
    table = read_table(str(source), split, dataset_config, max_rows)
    columns = Columns(prompt_column, completion_column, references_column, require_completion, text_column)
    return examples_of(table, columns)


def examples_of(table: Table, columns: Columns) -> Dataset:
    """Check the rows of a table, and give their columns the standard names, as [`load_examples`] returns them.

    Raises:
        DataError: at the first bad row, or for missing columns.
    """
    prompt, completion, is_required = columns.prompt, columns.completion, columns.require_completion
    if prompt == "prompt" and "prompt" not in table.columns:
        if MESSAGES in table.columns:
            prompt = MESSAGES
        elif columns.text is not None and columns.text in table.columns:
            return plain_texts(table, columns.text)
    if holds_whole_conversations(table, prompt, completion):
        table = split_conversations(table, prompt, is_required)
        completion = "completion"
    found = find_columns(table, prompt, completion, columns.references, is_required)
    return make_examples(table, found, is_required)


def make_examples(table: Table, found: dict[str, str], require_completion: bool) -> Dataset:
    """Check the rows of a table and rename its columns to the standard names, as [`load_examples`] returns them.

    Args:
        table (`Table`): the rows.
        found (`dict[str, str]`): the result of [`find_columns`].
        require_completion (`bool`): whether every row must have a completion.

    Raises:
        DataError: at the first bad row.
    """
    references = check_examples(table, found, require_completion)
    dataset = table.to_dataset(without=found.get("references"))
    renamed = {name: role for role, name in found.items() if name != role and role != "references"}
    dataset = dataset.rename_columns(renamed)
    if references is not None:
        dataset = dataset.add_column("references", references, feature=_REFERENCES)
    first = [role for role in ("prompt", "completion", "references") if role in dataset.column_names]
    return dataset.select_columns(first + [name for name in dataset.column_names if name not in first])


def unique_prompts(dataset: Dataset, keep_completion: bool = False, by: str | None = None) -> Dataset:
    """Keep each prompt once, for training on the student's own samples and for evaluation.

    Args:
        dataset ([`~datasets.Dataset`]): the result of [`load_examples`].
        keep_completion (`bool`, *optional*, defaults to `False`): whether to keep the first row's `completion`.
        by (`str`, *optional*): a column, if the dataset has it: prompts with different values of it differ.

    Returns:
        [`~datasets.Dataset`] with one row per distinct prompt, in order of first appearance: the prompt's first row
        without `completion`, unless it is kept. `references`, if present, holds all distinct references of the prompt,
        in order.
    """
    keys = [prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]
    if by is not None and by in dataset.column_names:
        keys = [f"{value} {key}" for value, key in zip(dataset[by], keys, strict=True)]
    first_rows: dict[str, int] = {}
    for row, key in enumerate(keys):
        first_rows.setdefault(key, row)
    if "references" in dataset.column_names:
        pooled: dict[str, dict[str, None]] = {key: {} for key in first_rows}  # a dict's keys are an ordered set
        for key, references in zip(keys, dataset["references"], strict=True):
            pooled[key].update(dict.fromkeys(references))
        # add the column before selecting rows: adding to selected rows would copy the whole dataset
        column = [list(pooled[key]) if first_rows[key] == row else [] for row, key in enumerate(keys)]
        dataset = dataset.remove_columns("references").add_column("references", column, feature=_REFERENCES)
    if not keep_completion:
        dataset = dataset.remove_columns([name for name in dataset.column_names if name == "completion"])
    return dataset.select(list(first_rows.values()))


def check_prompt_lengths(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    source: str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """Check that every prompt leaves room for its completion, before a model is loaded.

    Tokenizes prompts as the trainer does: text with the tokenizer's special tokens, conversations through its chat
    template with the generation prompt.

    Args:
        dataset ([`~datasets.Dataset`]): has a column `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        max_prompt_tokens (`int`): maximum number of tokens of a prompt, usually the models' context minus
            `max_completion_length`.
        source (`str`): the dataset as the user named it; errors begin with it.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.

    Raises:
        DataError: if prompts are longer, with their number and the first of them; or if prompts are conversations and
            the tokenizer has no chat template.
    """
    prompts = list(dataset["prompt"])
    if not prompts:
        return
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise DataError(
            f"{source}: its prompts are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat "
            "template. Set tokenizer.chat_template, or write the prompts as text."
        )
    lengths = list(map(len, encode_prompts(tokenizer, prompts, chat_template_kwargs)))
    too_long = [row for row, length in enumerate(lengths) if length > max_prompt_tokens]
    if too_long:
        raise DataError(
            f"{source}: {len(too_long)} of {len(prompts)} prompts have more than {max_prompt_tokens} tokens; the "
            f"first is row {too_long[0]} (counting from 0) with {lengths[too_long[0]]} tokens, "
            f"{shortened(prompts[too_long[0]])}. Raise the limit if the models' context allows, lower "
            "max_completion_length (in evaluate, max_new_tokens) to leave more room, or filter these prompts out."
        )


def read_table(source: str, split: str, dataset_config: str | None, max_rows: int | None) -> Table:
    """Find a source, see [`load_examples`], and read it without checking its values.

    Raises:
        DataError: if the source cannot be found or read.
    """
    path = local_path(source)
    if source == "e2e" or path.exists():
        refuse_configuration(source, dataset_config)
    if source == "e2e":
        return Table.from_dataset(f"{source} ({split})", _choose_split(source, load_e2e(), split), max_rows)
    if path.is_file():
        return read_file(path, max_rows)
    if path.is_dir():
        return _read_folder(path, split, max_rows)
    _refuse_missing(path, source)
    return _read_hub(source, split, dataset_config, max_rows)


def find_file(source: str, split: str, dataset_config: str | None) -> Path | None:
    """Return the file of a split of a local source other than `"e2e"` and saved datasets; None for a hub dataset.

    Raises:
        DataError: if there is no such file or folder.
    """
    path = local_path(source)
    if not path.exists():
        _refuse_missing(path, source)
        return None
    refuse_configuration(source, dataset_config)
    return path if path.is_file() else split_file(path, split, EXTENSIONS)


def local_path(source: str) -> Path:
    """Return the path of a source as a file or folder, whether or not it exists.

    Raises:
        DataError: if the path cannot be looked up, for example because it is too long or its folder is unreadable.
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of an unknown user
        raise DataError(f"{source}: cannot be looked up ({error}). Check the path.") from error
    return path


def refuse_configuration(source: str, dataset_config: str | None) -> None:
    """Refuse a configuration for a local source.

    Raises:
        DataError: if `dataset_config` is set.
    """
    if dataset_config is not None:
        raise DataError(
            f"{source}: dataset_config={dataset_config!r} chooses a configuration of a dataset on the hub, but this "
            "source is local. Leave dataset_config out."
        )


def has_splits(source: str) -> bool:
    """Return whether the source has splits: a file, or a folder with one saved `Dataset`, has none."""
    path = local_path(source)
    return source == "e2e" or not (path.is_file() or _is_single(path))


def local_files(source: str, split: str, extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """Return the files that [`read_table`] reads from a local source; an empty list for `"e2e"` and hub datasets.

    Raises:
        DataError: if a folder does not hold exactly one file of the split.
    """
    path = local_path(source)
    if source == "e2e" or not path.exists():
        return []
    if path.is_file():
        return [path]
    if is_saved(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [split_file(path, split, extensions)]


def split_file(folder: Path, split: str, extensions: Sequence[str]) -> Path:
    """Return the only file of a split in a folder.

    Raises:
        DataError: if the folder has no such file, or more than one.
    """
    files = [folder / f"{split}{extension}" for extension in extensions]
    files = [file for file in files if file.is_file()]
    if len(files) != 1:
        names = sorted(entry.name for entry in folder.iterdir())
        problem = f"more than one file of the split {split!r}" if files else f"no file of the split {split!r}"
        near = "" if files else nearest(f"{split}.jsonl", [n for n in names if n.lower().endswith(tuple(extensions))])
        wanted = [f"{split}{extension}" for extension in extensions]
        raise DataError(
            f"{folder}: holds {problem}; it holds {listing(names)}.{near} Keep one of {', '.join(wanted[:-1])} and "
            f"{wanted[-1]} there, or name a file."
        )
    return files[0]


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of a `Dataset` or `DatasetDict` wrote the folder."""
    return (folder / "dataset_dict.json").exists() or _is_single(folder)


def _is_single(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder, which then has no splits."""
    return (folder / "state.json").exists() and not (folder / "dataset_dict.json").exists()


def _refuse_missing(path: Path, source: str) -> None:
    """Refuse a missing source that cannot be the name of a dataset on the hub."""
    if _looks_like_path(source):
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{source[:1000]}: no such file or folder.{nearest(path.name, siblings)} Check the path.")


def _looks_like_path(source: str) -> bool:
    """Return whether the name can only be a path: a dataset on the hub is `name` or `owner/name`."""
    return source.startswith((".", "/", "~")) or source.lower().endswith(EXTENSIONS) or source.count("/") > 1


def _choose_split(source: str, splits: DatasetDict, split: str) -> Dataset:
    if split not in splits:
        raise DataError(f"{source}: no split {split!r}; its splits are {listing(splits)}.{nearest(split, splits)}")
    return splits[split]


def _read_folder(path: Path, split: str, max_rows: int | None) -> Table:
    if is_saved(path):
        try:
            saved = load_from_disk(path)
            for dataset in saved.values() if isinstance(saved, DatasetDict) else [saved]:
                dataset.data.validate(full=True)  # reading a damaged file would crash the process
        except (*_DAMAGE, OSError, ValueError, pa.ArrowException) as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
            raise DataError(f"{path}: cannot be read as a saved dataset ({problem}). Save it again.") from error
        saved = saved.with_format(None)  # a saved format may hide columns
        if isinstance(saved, DatasetDict):
            return Table.from_dataset(f"{path} ({split})", _choose_split(str(path), saved, split), max_rows)
        return Table.from_dataset(str(path), saved, max_rows)
    return read_file(split_file(path, split, EXTENSIONS), max_rows)


def _read_hub(source: str, split: str, dataset_config: str | None, max_rows: int | None) -> Table:
    try:
        dataset = load_dataset(source, dataset_config, split=split)
    except (OSError, ValueError, DatasetsError) as error:  # the hub's own errors are OSErrors
        raise DataError(
            f"{source}: neither a local file or folder, nor loadable from the hub with split {split!r} and "
            f"configuration {dataset_config!r} ({error}). Check the name, and the network or HF_HUB_OFFLINE."
        ) from error
    return Table.from_dataset(f"{source} ({split})", dataset, max_rows)
