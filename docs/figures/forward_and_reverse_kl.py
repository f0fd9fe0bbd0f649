"""A normal distribution fitted to one with two modes, by forward and by reverse KL.

python docs/figures/forward_and_reverse_kl.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from style import FOLDER, save

GRID = np.linspace(-7.0, 8.0, 301)
STEP = GRID[1] - GRID[0]


def normal(mean: float, deviation: float) -> np.ndarray:
    return np.exp(-0.5 * ((GRID - mean) / deviation) ** 2) / (deviation * np.sqrt(2.0 * np.pi))


TEACHER = 0.65 * normal(-2.0, 0.8) + 0.35 * normal(3.0, 0.9)


def kl(first: np.ndarray, second: np.ndarray) -> float:
    """KL(first || second) on the grid, in nats."""
    return float(np.sum(first * np.log((first + 1e-300) / (second + 1e-300))) * STEP)


def fit(reverse: bool) -> tuple[float, float]:
    """Mean and deviation of the student with the least divergence, on a grid of both."""

    def divergence(at: tuple[float, float]) -> float:
        student = normal(*at)
        return kl(student, TEACHER) if reverse else kl(TEACHER, student)

    candidates = [(mean, deviation) for mean in np.arange(-3.0, 3.5, 0.05) for deviation in np.arange(0.4, 4.0, 0.05)]
    return min(candidates, key=divergence)


def main(folder: Path = FOLDER) -> None:
    students = {"forward KL(p || q): covers both modes": fit(False), "reverse KL(q || p): keeps to one": fit(True)}

    def draw(figure: Figure, colours: dict[str, str]) -> None:
        for axes, (title, at) in zip(figure.subplots(1, 2, sharey=True), students.items(), strict=True):
            axes.fill_between(GRID, TEACHER, color=colours["muted"], alpha=0.3, linewidth=0)
            axes.plot(GRID, normal(*at), color=colours["a"], linewidth=2.2)
            axes.set_title(title, fontsize=11)
            axes.set_yticks([])
            axes.set_ylim(0.0, 0.62)
            axes.text(at[0] + 0.4, normal(*at).max() + 0.02, "student q", color=colours["a"])
            axes.text(4.0, 0.12, "teacher p", color=colours["text"])

    save("forward_and_reverse_kl", draw, (8.0, 2.6), folder)


if __name__ == "__main__":
    main()
