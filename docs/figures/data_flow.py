"""The way of the data through an iteration of the trainer.

python docs/figures/data_flow.py
"""

from html import escape
from pathlib import Path

from style import COLOURS, FOLDER

WIDTH, HEIGHT = 960, 690
# x, y, width, height, then title and lines
BOXES = (
    (15, 60, 150, 108, "Prompts\norder and batches\nby GRPOTrainer"),
    (195, 60, 175, 108, "Sample\na coin for each step:\nwhich model draws\nsampling.py"),
    (400, 60, 165, 108, "Score\nboth LM heads over\nthe states kept\nfused_head.py"),
    (595, 60, 170, 108, "Advantages\nrewards, returns, mu;\nno gradient\nobjectives.py"),
    (795, 60, 150, 108, "Buffer\ntokens, log mu, A,\nteacher's states\nrollouts.py"),
    (195, 250, 175, 86, "Student\ntrained, and draws\nthe rollouts"),
    (400, 250, 165, 86, "Teacher\nfrozen; in NF4,\nsharded, adapter"),
    (795, 420, 150, 108, "Micro-batch\nrows of like length;\nnever written to"),
    (620, 420, 145, 108, "Forward\nstudent's body;\nno teacher"),
    (
        305,
        420,
        285,
        108,
        "Loss, in chunks\nlog q, KL, clipped ratio, L_PT, beta;\nand the head's gradient\nloss.py, fused_head.py",
    ),
    (
        15,
        420,
        260,
        108,
        "Optimizer step\ndivided by its own tokens;\nskipped if not finite\nmasking.py, finite_steps.py",
    ),
    (305, 575, 285, 108, "Logs and evaluation\nthe student alone: Rouge-L,\nlengths, repetition\ntraining_metrics.py"),
    (15, 575, 260, 108, "Checkpoint\nweights, optimizer, buffer,\nrandom states\ncheckpoints.py"),
)
EDGES = {"Student": "a", "Teacher": "b"}
# x, y, width, height, and the title with where it begins
BANDS = (
    (5, 20, 950, 160, "Rollout: once for all passes over it", 17),
    (5, 380, 950, 160, "Updates, in several passes", 620),
)
# points of each arrow
ARROWS = (
    ((165, 114), (195, 114)),
    ((370, 114), (400, 114)),
    ((565, 114), (595, 114)),
    ((765, 114), (795, 114)),
    ((270, 250), (270, 168)),
    ((420, 250), (350, 168)),
    ((350, 250), (420, 168)),
    ((500, 250), (500, 168)),
    ((870, 168), (870, 420)),
    ((795, 474), (765, 474)),
    ((620, 474), (590, 474)),
    ((305, 474), (275, 474)),
    ((480, 336), (480, 420)),
    ((235, 420), (235, 336)),
    ((450, 528), (450, 575)),
    ((145, 528), (145, 575)),
)
NOTES = ((492, 362, "a copy of its head"), (880, 290, "again in"), (880, 310, "each pass"), (130, 362, "new weights"))


def text(x: float, y: float, words: str, colour: str, size: float, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}"{more}>{escape(words)}</text>'


def svg(colours: dict[str, str]) -> str:
    """The picture in one palette."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"',
        ' font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">',
        "<title>From prompts over rollouts and updates to new weights</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
        f'<path d="M0,0 L8,4 L0,8 z" fill="{colours["muted"]}"/></marker></defs>',
    ]
    for x, y, width, height, title, start in BANDS:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{colours["card"]}" opacity="0.6"/>'
        )
        parts.append(text(start, y + 24, title, colours["muted"], 15))
    for points in ARROWS:
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colours["muted"]}" stroke-width="1.6" '
            'marker-end="url(#head)"/>'
        )
    for x, y, width, height, words in BOXES:
        title, *lines = words.split("\n")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colours["ground"]}" '
            f'stroke="{colours[EDGES.get(title, "line")]}" stroke-width="1.6"/>'
        )
        parts.append(text(x + 10, y + 26, title, colours["text"], 17, ' font-weight="600"'))
        for number, line in enumerate(lines):
            parts.append(text(x + 10, y + 50 + 21 * number, line, colours["c" if ".py" in line else "muted"], 14.5))
    parts += [text(x, y, words, colours["muted"], 15) for x, y, words in NOTES]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(folder: Path = FOLDER) -> None:
    for mode, colours in COLOURS.items():
        (folder / f"data_flow-{mode}.svg").write_text(svg(colours))


if __name__ == "__main__":
    main()
