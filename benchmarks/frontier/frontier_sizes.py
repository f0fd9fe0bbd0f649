"""Question: does the best method of the family depend on how much larger the teacher is?

    for width in 8 32 96; do
        python benchmarks/frontier/frontier_run.py --task e2e_w$width --methods METHODS
        python benchmarks/frontier/frontier_summary.py --task e2e_w$width
    done
    python benchmarks/frontier/frontier_sizes.py

Reads the summaries of the sizes and that of e2e, and writes the table of docs/family.md: gains over SFT continued of
the same size, each method at its best rate for this size. Methods that only one size has are left out.
"""

import json
from collections import Counter
from typing import Any

from frontier_methods import METHODS  # puts the folders it needs on the path
from frontier_run import RESULTS
from frontier_summary import FAMILY_PAGE
from summarize import format_interval, insert_table
from tasks import SIZES

GAINS = ("tuned_rouge_l", "equal_entropy_rouge_l", "equal_entropy_reverse_kl")


def read_summaries() -> dict[str, dict[str, Any]]:
    """Return the results of every size that has a summary, the smallest student first."""
    paths = {task: RESULTS / f"frontier_{task}.json" for _, task in sorted(SIZES.items())}
    return {task: json.loads(path.read_text())["results"] for task, path in paths.items() if path.is_file()}


def sizes_table(summaries: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table: the methods that several sizes have, the largest gap first, with their gains."""
    head = ["teacher / student", "method", "rate", "Rouge-L, best decoding", "– SFT continued"]
    head += ["at equal entropy: – SFT continued", "reverse KL there: – SFT continued"]
    lines = ["| " + " | ".join(head) + " |", "|---:|---|" + "---:|" * (len(head) - 2)]
    seen = Counter(name for summary in summaries.values() for name, row in summary["rows"].items() if "minus" in row)
    for summary in summaries.values():
        for name, row in summary["rows"].items():
            if seen[name] < 2:
                continue
            gains = row["minus"].get("sft")
            cells = [f"{summary['teacher_over_student']:.0f}", METHODS[name].label, f"{row['learning_rate']:g}"]
            cells.append(format_interval(row["decodings"][row["tuned"]]["rouge_l"], 1))
            cells += [format_interval(gains[key], 1, sign=True) if gains else "–" for key in GAINS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    table = sizes_table(read_summaries())
    insert_table(FAMILY_PAGE, "sizes", table)
    print(table)


if __name__ == "__main__":
    main()
