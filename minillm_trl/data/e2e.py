"""The E2E NLG data, which ships with the package: human-written restaurant descriptions of lists of facts."""

import hashlib
import re
from pathlib import Path

from datasets import Dataset, DatasetDict

from ..files.messages import DataError, shortened
from .files import read_file

_FOLDER = Path(__file__).parent / "e2e_nlg"
_ATTRIBUTE = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


def load_e2e() -> DatasetDict:
    """Load the E2E NLG data (Novikova, Dusek, Rieser 2017, CC BY-SA 4.0) in our own splits.

    The published development and test files differ in distribution, so we pool them and split by meaning
    representation. The SHA-256 of its UTF-8 text modulo 100 decides: 0-19 is `test`, 20-27 `validation`, 28-99
    `train`. Descriptions are stripped of surrounding white space, and the 267 repeated (meaning representation,
    description) pairs are dropped, which leaves 9,098 rows with 1,177 meaning representations.

    Returns:
        [`~datasets.DatasetDict`] with `train`, `validation` and `test`, which share no meaning representation. Rows
        are ordered by the SHA-256 of the meaning representation, so the first rows are a random sample of the split.
        One row per description:

        - `mr`: the meaning representation as published, `"name[The Mill], near[Avalon]"`;
        - `prompt`: the same, `"name: The Mill | near: Avalon\\n"`;
        - `completion`: the description;
        - `references` (`list[str]`): all descriptions of that meaning representation.

    Raises:
        DataError: if a data file of the package is missing or damaged.
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
    """Return the split of a meaning representation from its SHA-256: 72 % `train`, 8 % `validation`, 20 % `test`."""
    bucket = int.from_bytes(_digest(mr), "big") % 100
    if bucket < 20:
        return "test"
    return "validation" if bucket < 28 else "train"


def format_prompt(mr: str) -> str:
    """Rewrite `"name[The Mill], near[Avalon]"` as `"name: The Mill | near: Avalon\\n"`.

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
