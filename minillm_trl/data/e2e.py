"""The E2E NLG data (restaurant descriptions, CC BY-SA 4.0) that ships with the package, see `e2e_nlg/ATTRIBUTION.md`."""

import gzip
import hashlib
import json
import re
from importlib.resources import files

from datasets import Dataset, DatasetDict

from .errors import DataError

_ATTRIBUTE = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")


def load_e2e() -> DatasetDict:
    """Load the development and test sets of E2E NLG, pooled and split again by meaning representation.

    The two files differ in distribution, so either alone would be a poor test of the other. A meaning representation goes
    to `test` if the SHA-256 of its text is below 10 modulo 100, to `validation` below 20, else to `train`, so none stands
    in two splits. Of the 9,365 rows none is dropped.

    Returns:
        [`~datasets.DatasetDict`] with `train`, `validation`, `test`; a row for each human-written text: `mr` (as
        published), `prompt` (the attributes as `name: The Punter | food: Italian`, then a line break), `completion` (the
        text), `references` (all texts for this meaning representation).

    Raises:
        DataError: if the package's data cannot be parsed.
    """
    references: dict[str, list[str]] = {}
    for name in ("dev", "test"):
        data = files(__package__).joinpath("e2e_nlg", f"{name}.jsonl.gz").read_bytes()
        for line in gzip.decompress(data).decode().splitlines():
            row = json.loads(line)
            references.setdefault(row["mr"], []).append(row["ref"])
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for mr, texts in references.items():
        prompt = format_prompt(mr)
        rows[_split_of(mr)] += [
            {"mr": mr, "prompt": prompt, "completion": text, "references": texts} for text in texts
        ]
    return DatasetDict({name: Dataset.from_list(split) for name, split in rows.items()})


def format_prompt(mr: str) -> str:
    """Format a meaning representation: `name[The Punter], food[Italian]` becomes `name: The Punter | food: Italian\\n`.

    Raises:
        DataError: if it does not consist of `attribute[value]` pairs.
    """
    pairs = _ATTRIBUTE.findall(mr)
    if not pairs or _ATTRIBUTE.sub("", mr).strip():
        raise DataError(f"{mr!r} is no meaning representation: expected attribute[value], attribute[value], ...")
    return " | ".join(f"{name}: {value}" for name, value in pairs) + "\n"


def _split_of(mr: str) -> str:
    bucket = int(hashlib.sha256(mr.encode()).hexdigest(), 16) % 100
    if bucket < 10:
        return "test"
    return "validation" if bucket < 20 else "train"
