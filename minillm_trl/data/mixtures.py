"""Mixtures of datasets, as TRL's `datasets:` in a YAML describes them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..files.messages import DataError, listing, nearest, shortened

_ROLES = ("prompt", "completion", "references")
_BUILDERS = ("json", "csv", "parquet")  # of `load_dataset`, with the file in `data_files`


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture.

    Attributes:
        source (`str`): file, folder or name on the hub.
        split (`str`): its split.
        dataset_config (`str`, *optional*): its configuration on the hub.
        columns (`dict[str, str]`): names in the source, as arguments of [`~load.load_examples`]: `prompt_column`, ...
        fraction (`float`, *optional*): relative share of the rows of the mixture.
        teacher (`str`, *optional*): name of the teacher of all rows, which becomes a column of the mixture.
    """

    source: str
    split: str
    dataset_config: str | None
    columns: dict[str, str]
    fraction: float | None
    teacher: str | None = None


def parse_parts(entries: Any) -> list[Part]:
    """Read the entries of `datasets`: `path`, and optionally `name`, `split`, `data_files`, `columns`, `fraction` and,
    for one of several teachers, `teacher`.

    As in TRL, `path: json` (`csv`, `parquet`) takes the file from `data_files`, and `columns` may list the columns to
    keep. It may also map roles (`prompt`, `completion`, `references`) to the names in the source.

    Raises:
        DataError: naming the entry, the key and the fix.
    """
    if not isinstance(entries, list) or not entries:
        raise DataError(f"datasets: expected a list of entries with `path`, got {shortened(entries)}.")
    parts = [_parse_part(entry, f"datasets[{number}]") for number, entry in enumerate(entries)]
    fractions = [part.fraction for part in parts if part.fraction is not None]
    if 0 < len(fractions) < len(parts):
        raise DataError("datasets: fraction is set for some entries only. Set it for all of them, or for none.")
    return parts


def _parse_part(entry: Any, place: str) -> Part:
    if not isinstance(entry, Mapping):
        raise DataError(f"{place}: expected `path` and other keys, got {shortened(entry)}.")
    known = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction", "teacher")
    for key in entry:
        if key not in known:
            raise DataError(f"{place}: unknown key {key!r}.{nearest(str(key), known)} There are {listing(known)}.")
    path, files = entry.get("path"), entry.get("data_files")
    if not isinstance(path, str) or not path:
        raise DataError(f"{place}: path is missing. Name a file, a folder or a dataset on the hub.")
    if entry.get("data_dir") is not None:
        raise DataError(f"{place}: data_dir is not supported. Name the folder or the files with `path`.")
    if path in _BUILDERS:
        if not isinstance(files, str):
            raise DataError(f"{place}: path {path} needs one file in data_files, got {shortened(files)}.")
        path = files
    elif files is not None:
        raise DataError(
            f"{place}: data_files is supported with path {listing(_BUILDERS)} only. Name the file as path."
        )
    fraction = entry.get("fraction")
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool) and math.isfinite(fraction)
    if fraction is not None and not (is_number and fraction > 0):
        raise DataError(f"{place}: fraction must be a positive number, got {shortened(fraction)}.")
    teacher = entry.get("teacher")
    if teacher is not None and (not isinstance(teacher, str) or not teacher):
        raise DataError(f"{place}: teacher must be the name of a teacher, got {shortened(teacher)}.")
    return Part(
        path,
        str(entry.get("split", "train")),
        entry.get("name"),
        _parse_columns(entry.get("columns"), place),
        fraction,
        teacher,
    )


def _parse_columns(columns: Any, place: str) -> dict[str, str]:
    if columns is None or isinstance(columns, list):
        return {}  # a list keeps columns; the roles are found by their names, and other columns are dropped anyway
    if not isinstance(columns, Mapping):
        raise DataError(f"{place}: columns must be a list or a mapping, got {shortened(columns)}.")
    for role in columns:
        if role not in _ROLES:
            raise DataError(
                f"{place}: columns: {role!r} is no role.{nearest(str(role), _ROLES)} Roles are {listing(_ROLES)}."
            )
    return {f"{role}_column": str(name) for role, name in columns.items()}


def load_mixture(
    parts: Sequence[Part],
    load: Callable[..., Dataset],
    max_rows: int | None = None,
    teacher_column: str | None = None,
) -> Dataset:
    """Load the parts and concatenate them.

    With fractions, each part gives its first rows, so many that the shares hold and no row repeats. `max_rows` keeps
    the shares too; without fractions, they are those of the parts' lengths.

    Args:
        parts (`Sequence[Part]`): from [`parse_parts`].
        load (`Callable`): [`~load.load_examples`], with the arguments that all parts share.
        max_rows (`int`, *optional*): limit of the rows of the mixture.
        teacher_column (`str`, *optional*): column that the parts have, or get from their `teacher`, besides the roles;
            None with a single teacher.

    Raises:
        DataError: if the parts differ in the kind of a column, have no column in common, or one gives no row.
    """
    datasets = [
        load(part.source, split=part.split, dataset_config=part.dataset_config, **part.columns) for part in parts
    ]
    datasets = [_with_teacher(part, dataset, teacher_column) for part, dataset in zip(parts, datasets, strict=True)]
    further = [] if teacher_column is None else [teacher_column]
    shared = check_same_kinds(parts, [dataset[0] for dataset in datasets], further)
    datasets = [dataset.select_columns(shared) for dataset in datasets]
    lengths = [len(dataset) for dataset in datasets]
    fractions = [
        length if part.fraction is None else part.fraction for part, length in zip(parts, lengths, strict=True)
    ]
    counts = rows_of_parts(lengths, fractions, max_rows)
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            raise DataError(
                f"datasets: {part.source} would give none of the {sum(counts)} rows. Raise its fraction or "
                "max_train_rows, give the other datasets more rows, or drop the dataset."
            )
    return concatenate_datasets(
        [dataset.select(range(count)) for dataset, count in zip(datasets, counts, strict=True)]
    )


def check_same_kinds(
    parts: Sequence[Part], firsts: Sequence[Mapping[str, Any]], further: Sequence[str] = ()
) -> list[str]:
    """Check that the first rows of the parts have columns in common, of the same kind, and return these columns.

    They are those of the roles, and `further` ones.

    Raises:
        DataError: naming the parts.
    """
    shared = [name for name in (*_ROLES, "text", *further) if all(name in first for first in firsts)]
    if not shared:
        raise DataError(f"datasets: {' and '.join(part.source for part in parts)} have no column in common.")
    for part, first in zip(parts, firsts, strict=True):
        for name in shared:
            if type(first[name]) is not type(firsts[0][name]):
                raise DataError(
                    f"datasets: {name} is a conversation in one of {parts[0].source} and {part.source}, and text in "
                    "the other. Convert one of them (prepare-data --template chat makes conversations)."
                )
    return shared


def _with_teacher(part: Part, dataset: Dataset, column: str | None) -> Dataset:
    """Return the rows of a part with the name of its teacher as a column, if the part names one."""
    if part.teacher is None:
        return dataset
    if column is None:
        raise DataError(f"datasets: {part.source} names the teacher {part.teacher!r}, but there are no `teachers`.")
    if column in dataset.column_names:
        raise DataError(
            f"datasets: {part.source} has a column {column!r} already. Drop `teacher` from its entry, or the column."
        )
    return dataset.add_column(column, [part.teacher] * len(dataset))


def rows_of_parts(lengths: Sequence[int], fractions: Sequence[float], max_rows: int | None = None) -> list[int]:
    r"""Return how many rows each part gives: $\mathrm{round}(w_i N)$ with the largest N that repeats no row.

    $$ w_i = f_i \Big/ \sum_j f_j, \qquad N = \min_i n_i / w_i $$

    Args:
        lengths (`Sequence[int]`): rows of each part (n).
        fractions (`Sequence[float]`): positive shares (f).
        max_rows (`int`, *optional*): limit of N. If it is lower, the rows of all parts are exactly so many.
    """
    total = sum(fractions)
    size = min(length * total / fraction for length, fraction in zip(lengths, fractions, strict=True))
    if max_rows is not None and max_rows < size:
        ends = [round(max_rows * share / total) for share in accumulate(fractions, initial=0)]
        return [end - start for start, end in pairwise(ends)]
    return [round(size * fraction / total) for fraction in fractions]
