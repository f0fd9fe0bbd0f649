"""Load the corpus of the language-modelling loss (the paper's L_PT): plain text, or prompts with completions."""

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from ..files.messages import DataError, listing, nearest
from .conversations import MESSAGES
from .files import EXTENSIONS, TEXT_EXTENSIONS, plain_texts, read_text_file
from .load import load_examples, local_files, local_path, read_table, refuse_configuration


def load_corpus(
    source: str | Path,
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    max_rows: int | None = None,
    dataset_config: str | None = None,
) -> Dataset | IterableDataset:
    """Load and check a corpus for `MiniLLMTrainer(lm_dataset=...)`.

    Args:
        source (`str` or `Path`): a `.txt` or `.txt.gz` file with one document per line, a folder with `<split>.txt`,
            or any source of [`load_examples`]. A source with the column `text_column` is plain text; any other holds
            prompts and completions, or `messages`.
        split, max_rows, dataset_config: see [`load_examples`].
        text_column (`str`, *optional*, defaults to `"text"`): the column with the text. A column other than the
            default must exist.
        streaming (`bool`, *optional*, defaults to `False`): read a dataset on the hub while training instead of
            downloading it first. Streamed rows are not checked.

    Returns:
        [`~datasets.Dataset`] with a column `text` (empty texts removed), or with `prompt` and `completion`. An
        [`~datasets.IterableDataset`] if `streaming`.

    Raises:
        DataError: naming file and line, the value and the fix.
    """
    if streaming:
        return _stream(str(source), split, text_column, max_rows, dataset_config)
    path = local_path(str(source))
    files = corpus_files(str(source), split) if path.is_dir() else [path]
    if len(files) == 1 and files[0].name.lower().endswith(TEXT_EXTENSIONS):
        refuse_configuration(str(source), dataset_config)
        return read_text_file(files[0], max_rows).to_dataset()
    table = read_table(str(source), split, dataset_config, max_rows)
    if text_column not in table.columns:
        if text_column != "text":
            raise DataError(
                f"{table.source}: no column {text_column!r}; its columns are {listing(table.columns)}."
                f"{nearest(text_column, table.columns)} Set text_column to the column with the text."
            )
        if not {"prompt", "completion"} <= set(table.columns) and MESSAGES not in table.columns:
            raise DataError(
                f"{table.source}: neither a column 'text' nor the columns 'prompt' and 'completion', nor 'messages'; "
                f"its columns are {listing(table.columns)}. Set text_column to the column with the text, or rename "
                "the columns."
            )
        examples = load_examples(
            source, split=split, require_completion=True, max_rows=max_rows, dataset_config=dataset_config
        )
        return examples.select_columns(["prompt", "completion"])
    texts = plain_texts(table, text_column)
    return texts if text_column == "text" else texts.rename_column(text_column, "text")


def corpus_files(source: str, split: str) -> list[Path]:
    """Return the files that [`load_corpus`] reads from a local source; an empty list for a dataset on the hub.

    Raises:
        DataError: if a folder does not hold exactly one file of the split.
    """
    return local_files(source, split, (*EXTENSIONS, *TEXT_EXTENSIONS))


def _stream(
    source: str, split: str, text_column: str, max_rows: int | None, dataset_config: str | None
) -> IterableDataset:
    try:
        stream = load_dataset(source, dataset_config, split=split, streaming=True)
        first: dict[str, Any] = next(iter(stream), {})
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source}: cannot be streamed from the hub with split {split!r} and configuration {dataset_config!r} "
            f"({error}). Check the name, and the network or HF_HUB_OFFLINE; a local file is read without streaming."
        ) from error
    names = [text_column] if text_column in first else ["prompt", "completion"]
    if not set(names) <= set(first):
        raise DataError(
            f"{source}: neither a column {text_column!r} nor the columns 'prompt' and 'completion'; its columns are "
            f"{listing(first)}. Set text_column to the column with the text."
        )
    stream = stream.select_columns(names)
    stream = stream.rename_column(text_column, "text") if names == [text_column] and text_column != "text" else stream
    return stream if max_rows is None else stream.take(max_rows)
