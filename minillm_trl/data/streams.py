"""Examples that are read while training: files and datasets on the hub as streams, and mixtures of them."""

from collections.abc import Sequence
from typing import Any

from datasets import IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

from ..files.messages import DataError
from .files import EXTENSIONS, Table
from .load import Columns, examples_of, find_file, is_saved, local_path
from .mixtures import Part, check_same_kinds

_CHECKED_AT_ONCE = 100  # rows


def load_stream(
    source: str,
    columns: Columns,
    *,
    split: str = "train",
    dataset_config: str | None = None,
    max_rows: int | None = None,
) -> IterableDataset:
    """Read examples while training, checked as they are read.

    Args:
        source (`str`): a file, a folder with a file of each split, or the name of a dataset on the hub.
        columns ([`~load.Columns`]): names in the source.
        split, dataset_config, max_rows: see [`~load.load_examples`].

    Returns:
        [`~datasets.IterableDataset`] with the columns of [`~load.load_examples`].

    Raises:
        DataError: if the source cannot be read, or its first rows cannot be used; while it is read, at a row that
            cannot be used, with its number.
    """
    stream = _open(source, split, dataset_config)
    if max_rows is not None:
        stream = stream.take(max_rows)
    first = _first_row(stream, source)

    def examples(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        table = Table(source, batch, lambda row: f"{source}, row {indices[row]} (counting from 0)")
        return examples_of(table, columns).to_dict()

    examples({name: [value] for name, value in first.items()}, [0])
    return stream.map(
        examples, batched=True, batch_size=_CHECKED_AT_ONCE, with_indices=True, remove_columns=list(first)
    )


def load_streamed_mixture(parts: Sequence[Part], columns: Columns, max_rows: int | None = None) -> IterableDataset:
    """Read the parts of a mixture one after another, while training.

    Raises:
        DataError: as [`load_stream`] does, and for parts with fractions, whose shares depend on unknown lengths, as in
            TRL.
    """
    for part in parts:
        if part.teacher is not None:
            raise DataError(
                f"datasets: {part.source} names the teacher {part.teacher!r}, but streams have one teacher. Drop "
                "teacher, or streaming."
            )
        if part.fraction is not None:
            raise DataError(
                f"datasets: {part.source} has a fraction, which needs the lengths of the datasets; streams have none. "
                "Drop fraction or streaming."
            )
    streams = [
        load_stream(part.source, columns.renamed(part.columns), split=part.split, dataset_config=part.dataset_config)
        for part in parts
    ]
    firsts = [_first_row(stream, part.source) for stream, part in zip(streams, parts, strict=True)]
    shared = check_same_kinds(parts, firsts)
    mixture = concatenate_datasets([stream.select_columns(shared) for stream in streams])
    return mixture if max_rows is None else mixture.take(max_rows)


def _open(source: str, split: str, dataset_config: str | None) -> IterableDataset:
    path = local_path(source)
    if source == "e2e" or (path.is_dir() and is_saved(path)):
        raise DataError(f"{source}: is read from the disk in any case. Drop dataset_streaming.")
    name, files = source, None
    if (file := find_file(source, split, dataset_config)) is not None:
        extension = next((end for end in EXTENSIONS if file.name.lower().endswith(end)), None)
        if extension is None:
            raise DataError(f"{file}: unknown extension {file.suffix!r}. Known are {', '.join(EXTENSIONS)}.")
        name, files, split = extension.split(".")[1].removesuffix("l"), str(file), "train"
    try:
        return load_dataset(name, dataset_config, data_files=files, split=split, streaming=True)
    except StopIteration as error:  # from the builder of an empty .jsonl
        raise DataError(f"{source}: has no rows. Check that it was written completely.") from error
    except (OSError, ValueError, DatasetsError) as error:  # the hub's own errors are OSErrors
        raise DataError(
            f"{source}: cannot be streamed with split {split!r} and configuration {dataset_config!r} ({error}). Check "
            "the name, and the network or HF_HUB_OFFLINE."
        ) from error


def _first_row(stream: IterableDataset, source: str) -> dict[str, Any]:
    try:
        first = next(iter(stream), None)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: cannot be read ({error}). Check that it was written completely.") from error
    if first is None:
        raise DataError(f"{source}: has no rows. Check that it was written completely.")
    return first
