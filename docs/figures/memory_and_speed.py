"""Writes the tables of `docs/memory_and_speed.md` from the results of the benchmarks.

python docs/figures/memory_and_speed.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from recipe_memory import RECIPES, read_stage  # noqa: E402 - lies in benchmarks/, which is no package
from report import GPU, RESULTS, measured, measured_on_gpu, read  # noqa: E402

PAGE = ROOT / "docs/memory_and_speed.md"
STRATEGIES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP"}


def recipes() -> str:
    """The estimated peak of a GPU in each recipe, in GiB."""
    columns = ("sft_teacher", "kd", "minillm", "minillm_lora", "minillm_qlora")
    lines = [
        "| recipe | GPUs | " + " | ".join(f"`{name}`" for name in columns) + " |",
        "|---|---:" + "|---:" * 5 + "|",
    ]
    for name, stages in read("recipe_memory").items():
        _, _, processes = read_stage(RECIPES / name, "minillm")
        peaks = [
            f"{stages[column]['gpu']:.0f} ({STRATEGIES[read_stage(RECIPES / name, column)[1]]})" for column in columns
        ]
        lines.append(f"| [{name}](../recipes/{name}/README.md) | {processes} | " + " | ".join(peaks) + " |")
    return "\n".join(lines)


def device(name: str, folder: Path) -> str:
    """What a result was measured on."""
    found = json.loads((folder / f"{name}.json").read_text())["machine"]["device"]
    return found if folder == GPU else "CPU"


def head() -> str:
    """Memory of the loss, with full logits and in chunks."""
    lines = ["| on | precision | rows of the vocabulary | with logits of all tokens | in chunks |"]
    lines.append("|---|---|---:|---:|---:|")
    for folder in (RESULTS, GPU):
        for precision, results in read("head_memory", folder).items():
            for vocabulary in sorted({int(case.split(", ")[1]) for case in results["cases"]}):
                full, chunked = (
                    f"{results['cases'][f'{way}, {vocabulary}']['bytes'] / 2**30:.1f} GiB"
                    for way in ("full_logits", "chunked")
                )
                where = device("head_memory", folder)
                lines.append(f"| {where} | {precision} | {vocabulary:,} | {full} | {chunked} |")
    return "\n".join(lines)


def speed() -> str:
    """How many times as fast, of all that was measured so."""
    lines = ["| what | case | on | times as fast |", "|---|---|---|---:|"]
    for folder, figures in ((RESULTS, measured()), (GPU, measured_on_gpu())):
        lines += [
            f"| {each.what} | {each.case} | {device(each.script, folder)} | {each.middle:.2f} |"
            for each in figures
            if each.at_least
        ]
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its tables made anew."""
    for table in (recipes, head, speed):
        start, end = f"<!-- {table.__name__}: made by docs/figures/memory_and_speed.py -->\n", "\n<!-- end -->"
        before, rest = page.split(start)
        page = before + start + table() + end + rest.split(end, 1)[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
