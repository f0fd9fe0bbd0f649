"""Claim: the split of `minillm-trl prepare-data --task dolly` nearly equals that of the authors' code.

    minillm-trl prepare-data --task dolly --tokenizer openai-community/gpt2 --max_prompt_length 256 \\
        --output_dir data/dolly
    python benchmarks/dolly_split.py --ours data/dolly --authors FOLDER

FOLDER holds the authors' parts as `train.jsonl`, `dev.jsonl` and `valid.jsonl` (their names; the last is the test
set), or with other names that end in `_train`, `_dev` and `_eval`, optionally compressed with gzip. Rows have
`instruction` and `output`. The authors used Dolly's first release, which has citation marks like "[3]". So rows are
matched by instruction and output without such marks and without white space. Rows with other corrections count as
different. Writes `results/dolly_split.json`.
"""

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path

from measurement import write_record

PARTS = {"train": ("train",), "validation": ("dev",), "test": ("valid", "eval")}


def key(instruction: str, output: str) -> str:
    return re.sub(r"\[\d+\]|\s+", "", f"{instruction}|{output}")


def read(path: Path) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def authors_part(folder: Path, names: tuple[str, ...]) -> list[dict]:
    found = [path for path in sorted(folder.iterdir()) if re.search(rf"({'|'.join(names)})\.jsonl(\.gz)?$", path.name)]
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one file that ends in {' or '.join(names)}.jsonl, found {found}.")
    return read(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--authors", type=Path, required=True)
    arguments = parser.parse_args()
    results = {}
    for split, names in PARTS.items():
        ours = Counter(
            key(row["instruction"], row["references"][0]) for row in read(arguments.ours / f"{split}.jsonl")
        )
        theirs = Counter(key(row["instruction"], row["output"]) for row in authors_part(arguments.authors, names))
        shared = sum((ours & theirs).values())
        results[split] = {"ours": ours.total(), "authors": theirs.total(), "shared": shared}
        print(f"{split:<12} ours {ours.total():>6}   authors' {theirs.total():>6}   shared {shared:>6}")
    command = "python benchmarks/dolly_split.py --ours data/dolly --authors FOLDER"
    write_record("dolly_split", ("torch", "datasets", "transformers"), {}, results, command)


if __name__ == "__main__":
    main()
