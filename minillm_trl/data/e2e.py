"""The E2E NLG data: restaurant descriptions that people wrote for a list of facts. It ships with the package."""

import hashlib
import re
from pathlib import Path

from datasets import Dataset, DatasetDict

from ..files.messages import DataError, shortened
from .files import read_file

_FOLDER = Path(__file__).parent / "e2e_nlg"
_ATTRIBUTE = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


def load_e2e() -> DatasetDict:
    """Load the E2E NLG data (Novikova, Dusek, Rieser 2017, CC BY-SA 4.0), split anew.

    The published development and test files differ in distribution, so both are pooled and split by meaning
    representation: the SHA-256 of its UTF-8 text, as a number modulo 100, is below 20 for `test`, below 28 for
    `validation`, and else means `train`. Descriptions lose white space at their ends; the 267 rows that repeat a
    (meaning representation, description) pair are dropped, which leaves 9,098 rows of 1,177 meaning representations.

    Returns:
        [`~datasets.DatasetDict`] with `train`, `validation` and `test`. No meaning representation is in two of them.
        Meaning representations are ordered by their SHA-256, so that the first rows are a fair sample of a split, and
        the descriptions of each follow one another. One row a description:

        - `mr`: the meaning representation as published, `"name[The Mill], near[Avalon]"`;
        - `prompt`: the same, `"name: The Mill | near: Avalon\\n"`;
        - `completion`: the description;
        - `references` (`list[str]`): all descriptions of that meaning representation.

    Raises:
        DataError: if a file of the package is missing or damaged.
    """
    descriptions: dict[str, dict[str, None]] = {}  # a dict's keys are an ordered set
    for name in ("dev.jsonl.gz", "test.jsonl.gz"):
        table = read_file(_FOLDER / name)
        for mr, reference in zip(table.columns["mr"], table.columns["ref"], strict=True):
            descriptions.setdefault(mr, {})[reference.strip()] = None
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for mr in sorted(descriptions, key=_digest):
        references = list(descriptions[mr])
        prompt = format_prompt(mr)
        splits[split_of(mr)].extend(
            {"mr": mr, "prompt": prompt, "completion": reference, "references": references} for reference in references
        )
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def split_of(mr: str) -> str:
    """The split of a meaning representation, by its SHA-256 alone: 72 % `train`, 8 % `validation`, 20 % `test`."""
    bucket = int.from_bytes(_digest(mr), "big") % 100
    if bucket < 20:
        return "test"
    return "validation" if bucket < 28 else "train"


def format_prompt(mr: str) -> str:
    """Write `"name[The Mill], near[Avalon]"` as `"name: The Mill | near: Avalon\\n"`.

    Raises:
        DataError: if an attribute is not written as `name[value]`.
    """
    pairs = []
    for attribute in mr.split(", "):
        match = _ATTRIBUTE.fullmatch(attribute)
        if match is None:
            raise DataError(
                f"{shortened(attribute)} in the meaning representation {mr!r} is not written as name[value]; "
                "attributes are separated by ', '."
            )
        pairs.append(f"{match[1]}: {match[2]}")
    return " | ".join(pairs) + "\n"


def _digest(mr: str) -> bytes:
    return hashlib.sha256(mr.encode()).digest()
