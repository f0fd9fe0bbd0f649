"""The tables, answers and figure that `real_summary.py` puts into the pages."""

import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from matplotlib.figure import Figure
from real_measures import NGRAMS, TEMPERATURES
from real_methods import METHODS
from summarize import format_interval, insert_table

README = Path(__file__).with_name("README.md")
FRONT_PAGE = Path(__file__).parents[2] / "README.md"
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_quickstart_lora.ipynb"
SAMPLED = [decoding for decoding in TEMPERATURES if decoding != "greedy"]
LABELS = {
    "teacher": "teacher",
    "heal": "healed student (the start)",
    "context_teacher": "teacher, fine-tuned",
    "context_start": "healed student, fine-tuned (the start)",
    "context_sft": "healed student, fine-tuned for longer (the start)",
}
OPEN_ANSWERS = 3  # on the front page and in the notebook; the others are folded

# Titles and digits of the columns, by measure
QUALITY = {
    "tuned_rouge_l": ("Rouge-L, best decoding", 1),
    "greedy_rouge_l": ("greedy", 1),
    "equal_entropy_rouge_l": ("at equal entropy", 1),
    "context_greedy_rouge_l": ("Dolly with context, greedy", 1),
    "selfinst_greedy_rouge_l": ("SelfInst, greedy", 1),
    "vicuna_greedy_rouge_l": ("Vicuna, greedy", 1),
}
DIVERGENCE = {
    "reverse_kl_per_token": ("reverse KL at 1", 2),
    "equal_entropy_reverse_kl": ("reverse KL at equal entropy", 2),
    "forward_kl_per_token": ("forward KL at 1", 2),
    "greedy_teacher_logp": ("teacher's log-prob, greedy", 2),
    "exposure_bias": ("exposure bias at 1 (%)", 0),
}


def label_of(name: str, row: dict[str, Any]) -> str:
    """Return the label of a row."""
    return row.get("label", LABELS.get(name, name))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table whose first columns are texts and whose others are numbers."""
    rule = "|---" * texts + "|" + "---:|" * (len(head) - texts)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _measured(summary: dict[str, Any], columns: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Return the columns that any row has."""
    return {
        name: column
        for name, column in columns.items()
        if any(name in row["measures"] for row in summary["rows"].values())
    }


def _measures(found: dict[str, list[float]], columns: dict[str, tuple[str, int]], sign: bool = False) -> list[str]:
    return [format_interval(found.get(name), digits, sign) for name, (_, digits) in columns.items()]


def quality_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of training and Rouge-L."""
    columns = _measured(summary, QUALITY)
    head = [
        "",
        "CPU-seconds",
        "updates",
        "rate (tried)",
        "seeds",
        "best decoding",
        *(title for title, _ in columns.values()),
    ]
    lines = []
    for name, row in summary["rows"].items():
        training = ["–"] * 4
        if "updates" in row:
            rate = f"{row['learning_rate']:g} ({len(row['learning_rates_tried'])})"
            rate += "" if row["learning_rate_is_best"] else ", the best is not tested yet"
            training = [f"{row['seconds']:.0f}", str(row["updates"]), rate, str(len(row["seeds"]))]
        lines.append([label_of(name, row), *training, row["tuned"], *_measures(row["measures"], columns)])
    return _table(head, lines)


def divergence_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the distances from the teacher, in nats a token."""
    head = ["", "entropy at 1", *(title for title, _ in DIVERGENCE.values())]
    lines = []
    for name, row in summary["rows"].items():
        entropy = format_interval(row["decodings"]["1.0"]["entropy_per_token"], 2)
        lines.append([label_of(name, row), entropy, *_measures(row["measures"], DIVERGENCE)])
    return _table(head, lines)


def text_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of length, ends, repetition and diversity of the answers."""
    parts = ["length", "ends", "repeated 4-grams", *(f"distinct-{n}" for n in NGRAMS)]
    head = ["", *(f"{part}, greedy" for part in parts), *(f"{part} at 1" for part in parts)]
    lines = []
    for name, row in summary["rows"].items():
        cells = [label_of(name, row)]
        for decoding in ("greedy", "1.0"):
            found, distinct = row["decodings"][decoding], row.get("distinct", {}).get(decoding)
            cells += [f"{found['length'][0]:.0f}", f"{100 * found['eos_rate'][0]:.0f} %"]
            cells.append(f"{found['repeated_4grams'][0]:.2f}")
            cells += ["–" if distinct is None else f"{distinct[str(n)]:.2f}" for n in NGRAMS]
        lines.append(cells)
    return _table(head, lines)


def differences_table(summary: dict[str, Any], columns: dict[str, tuple[str, int]]) -> str:
    """Return the Markdown table of the differences between MiniLLM and its rivals."""
    rows, lines, columns = summary["rows"], [], _measured(summary, columns)
    for name in [name for name in rows if name in METHODS and METHODS[name].kind == "minillm"]:
        for rival, found in rows[name]["minus"].items():
            labels = [label_of(name, rows[name]), label_of(rival, rows[rival])]
            lines.append([*labels, *_measures(found, columns, sign=True)])
    return _table(["", "minus", *(title for title, _ in columns.values())], lines, texts=2)


def clear_differences(summary: dict[str, Any]) -> str:
    """Return a list of the Rouge-L differences whose intervals exclude 0, with the number of all of them."""
    rows, total, clear, lines = summary["rows"], 0, 0, []
    for name in [name for name in rows if name in METHODS and METHODS[name].kind == "minillm"]:
        sides: dict[str, list[str]] = {"ahead of": [], "behind": []}
        for rival, found in rows[name]["minus"].items():
            values = {title: found[key] for key, (title, _) in QUALITY.items() if key in found}
            total += len(values)
            for side, is_on in (("ahead of", lambda low, high: low > 0), ("behind", lambda low, high: high < 0)):
                cells = [
                    f"{title.removeprefix('Rouge-L, ')} {format_interval(value, 1, sign=True)}"
                    for title, value in values.items()
                    if is_on(*value[1:])
                ]
                clear += len(cells)
                if cells:
                    sides[side].append(f"{label_of(rival, rows[rival])} ({'; '.join(cells)})")
        texts = [f"{side} {', '.join(found)}" for side, found in sides.items() if found]
        lines.append(f"- {label_of(name, rows[name])}: {'; '.join(texts) or 'none'}.")
    head = (
        f"{clear} of these {total} differences have an interval that excludes 0. If there were no differences, about "
        f"{total / 20:.0f} would:"
    )
    return "\n".join([head, "", *lines])


def answers_table(answers: dict[str, Any], rows: slice = slice(None)) -> str:
    """Return the Markdown table of prompts and answers."""
    columns = ("prompt", "teacher", "start", "student")
    head = ["prompt", "teacher", "start", "MiniLLM student"]
    lines = [[escape(row[column]) for column in columns] for row in answers["rows"][rows]]
    return _table(head, lines, texts=len(head))


def escape(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|$~#])", r"\\\1", plain)


def answers_block(summary: dict[str, Any], opened: int | None = None) -> str:
    """Return who wrote the answers, and their table; the rows after the first `opened` are folded.

    The words of the models are not ours, so the check of words leaves them out.
    """
    answers = summary["answers"]
    lines = [
        f"Greedy answers, cut at {summary['answer_tokens']} tokens. The MiniLLM student is the one with the highest "
        f"validation Rouge-L: {answers['label']}; training seed {answers['seed']}.",
        "<!-- words: off -->",
        answers_table(answers, slice(opened)),
    ]
    if opened is not None and (rest := len(answers["rows"]) - opened) > 0:
        table = answers_table(answers, slice(opened, None))
        lines.append(f"<details><summary>{rest} more</summary>\n\n{table}\n\n</details>")
    return "\n\n".join([*lines, "<!-- words: on -->"])


def pages(summary: dict[str, Any], scale: str) -> dict[Path, dict[str, str]]:
    """Return the generated parts of each page, by their marks; only the answers to short prompts are on pages."""
    tables = {
        "quality": quality_table(summary),
        "divergence": divergence_table(summary),
        "text": text_table(summary),
        "quality differences": differences_table(summary, QUALITY),
        "clear differences": clear_differences(summary),
        "divergence differences": differences_table(summary, DIVERGENCE),
    }
    if scale != "cpu":
        mark = scale.removeprefix("cpu_").replace("_", " ")
        return {README: {f"{mark} {name}": table for name, table in tables.items()}}
    parts = {README: tables}
    if summary["answers"] is not None:
        parts[README]["answers"] = answers_block(summary)
        parts |= {FRONT_PAGE: {"answers": answers_block(summary, OPEN_ANSWERS)}}
        parts |= {NOTEBOOK: {"answers": answers_block(summary, OPEN_ANSWERS)}}
    return parts


def write_pages(summary: dict[str, Any], scale: str) -> None:
    """Put the generated parts into the pages."""
    for path, parts in pages(summary, scale).items():
        for name, text in parts.items():
            insert_in_notebook(path, name, text) if path.suffix == ".ipynb" else insert_table(path, name, text)


def insert_in_notebook(path: Path, name: str, text: str) -> None:
    """Put a text between its marks in the Markdown cell that has them."""
    notebook = json.loads(path.read_text())
    start, end = f"<!-- {name}: made by a script -->\n", f"<!-- end of {name} -->"
    (cell,) = [cell for cell in notebook["cells"] if start in cell["source"]]
    before, rest = "".join(cell["source"]).split(start)
    cell["source"] = f"{before}{start}{text}\n{end}{rest.split(end)[1]}".splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw Rouge-L and reverse KL over entropy."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("Rouge-L →", "← reverse KL (nats a token)")
    for axes, key, title in zip(panels, ("rouge_l", "reverse_kl_per_token"), titles, strict=True):
        for number, (name, row) in enumerate(summary["rows"].items()):
            points = [row["decodings"][decoding] for decoding in SAMPLED]
            if key in points[0]:
                values = np.array([point[key] for point in points])
                axes.errorbar(
                    [point["entropy_per_token"][0] for point in points],
                    values[:, 0],
                    yerr=[values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]],
                    color=f"C{number}",
                    linestyle="--" if name in LABELS else "-",
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=label_of(name, row),
                )
        axes.set_xlabel("entropy (nats a token), at temperatures " + ", ".join(SAMPLED), fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
    )
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
