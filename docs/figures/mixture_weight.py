"""The importance weight of a token under teacher-mixed sampling, and where the clip begins.

python docs/figures/mixture_weight.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from style import FOLDER, save

ALPHA, EPSILON = 0.2, 0.2


def weight(ratio: np.ndarray, alpha: float) -> np.ndarray:
    """q / mu for p / q = `ratio`."""
    return 1.0 / (1.0 - alpha + alpha * ratio)


def main(folder: Path = FOLDER) -> None:
    ratio = np.logspace(-3, 3, 400)

    def draw(figure: Figure, colours: dict[str, str]) -> None:
        axes = figure.subplots()
        axes.axhspan(1.0 - EPSILON, 1.0 + EPSILON, color=colours["muted"], alpha=0.25, linewidth=0)
        axes.plot(ratio, weight(ratio, ALPHA), color=colours["a"], linewidth=2.2)
        axes.axhline(1.0 / (1.0 - ALPHA), color=colours["b"], linestyle="--", linewidth=1.2)
        axes.text(900, 1.0 / (1.0 - ALPHA) + 0.03, "1 / (1 - alpha)", color=colours["b"], ha="right")
        axes.text(900, 1.05, "range of the clip, 1 - epsilon to 1 + epsilon", color=colours["text"], ha="right")
        axes.set_xscale("log")
        axes.set_ylim(0.0, 1.42)
        axes.set_xlabel("p(y) / q(y): how much more likely the token is under the teacher")
        axes.set_ylabel("weight q(y) / mu(y)")

    save("mixture_weight", draw, (8.0, 2.9), folder)


if __name__ == "__main__":
    main()
