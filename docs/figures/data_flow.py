"""The way of the data through an iteration of the trainer.

python docs/figures/data_flow.py
"""

from html import escape
from pathlib import Path

from style import COLOURS, FOLDER

WIDTH, HEIGHT = 1000, 640
# name: x, y, width, height, title, lines below it
BOXES = {
    "prompts": (20, 70, 140, 92, "Prompts", ("batches and order", "are GRPOTrainer's")),
    "sample": (190, 70, 195, 92, "Sample", ("a coin for each step:", "which model draws", "sampling.py, decoding.py")),
    "score": (415, 70, 180, 92, "Score", ("both LM heads, over", "the states kept", "fused_head.py")),
    "advantage": (625, 70, 165, 92, "Advantages", ("rewards, returns, mu;", "no gradient", "objectives.py")),
    "buffer": (820, 70, 160, 92, "Buffer", ("tokens, log mu, A,", "teacher's states", "rollouts.py")),
    "student": (190, 232, 195, 72, "Student", ("trained; samples, as a", "half-precision copy")),
    "teacher": (415, 232, 180, 72, "Teacher", ("frozen; whole, in NF4,", "sharded, or an adapter")),
    "batch": (820, 388, 160, 92, "Micro-batch", ("rows of like length;", "never written to")),
    "forward": (625, 388, 165, 92, "Forward", ("the student's body;", "no teacher")),
    "loss": (
        335,
        388,
        260,
        92,
        "Loss, in chunks",
        ("log q, KL, clipped ratio, L_PT,", "beta, and the head's gradient", "loss.py, fused_head.py"),
    ),
    "step": (
        20,
        388,
        270,
        92,
        "Optimizer step",
        ("divided by its own tokens;", "skipped if not finite", "masking.py, reliable_trainer.py"),
    ),
    "metrics": (
        335,
        540,
        260,
        92,
        "Logs and evaluation",
        ("the student alone: Rouge-L,", "lengths, repetition", "training_metrics.py"),
    ),
    "checkpoint": (20, 540, 270, 92, "Checkpoint", ("weights, optimizer, buffer,", "random states", "checkpoints.py")),
}
# x, y, width, height, and the title with where it begins
BANDS = (
    (10, 30, 980, 146, "Rollout: once for all passes over it", 22),
    (10, 348, 980, 146, "Updates, in several passes", 627),
)
# points of each arrow
ARROWS = (
    ((160, 116), (190, 116)),
    ((385, 116), (415, 116)),
    ((595, 116), (625, 116)),
    ((790, 116), (820, 116)),
    ((285, 232), (285, 162)),
    ((450, 232), (360, 162)),
    ((375, 232), (450, 162)),
    ((520, 232), (520, 162)),
    ((900, 162), (900, 388)),
    ((820, 434), (790, 434)),
    ((625, 434), (595, 434)),
    ((335, 434), (290, 434)),
    ((505, 304), (505, 388)),
    ((240, 388), (240, 304)),
    ((460, 480), (460, 540)),
    ((155, 480), (155, 540)),
)
NOTES = ((520, 326, "a copy of its head"), (910, 275, "again in"), (910, 293, "each pass"), (145, 332, "new weights"))


def text(x: float, y: float, words: str, colour: str, size: int, more: str = "") -> str:
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
    for name, (x, y, width, height, title, lines) in BOXES.items():
        edge = colours[{"student": "a", "teacher": "b"}.get(name, "line")]
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colours["ground"]}" '
            f'stroke="{edge}" stroke-width="1.6"/>'
        )
        parts.append(text(x + 12, y + 24, title, colours["text"], 16, ' font-weight="600"'))
        for number, line in enumerate(lines):
            colour = colours["c" if ".py" in line else "muted"]
            parts.append(text(x + 12, y + 45 + 18 * number, line, colour, 13))
    parts += [text(x, y, words, colours["muted"], 14) for x, y, words in NOTES]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(folder: Path = FOLDER) -> None:
    for mode, colours in COLOURS.items():
        (folder / f"data_flow-{mode}.svg").write_text(svg(colours))


if __name__ == "__main__":
    main()
