"""What the figures of the documentation share: each is saved twice, for pages on light and on dark ground."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
COLOURS = {
    "light": {"text": "#1c2026", "muted": "#5c6570", "line": "#c3cad2", "card": "#eef2f5", "ground": "#ffffff"}
    | {"a": "#0072b2", "b": "#b85c00", "c": "#007a5a"},
    "dark": {"text": "#e6e9ed", "muted": "#9aa5b1", "line": "#4a545f", "card": "#262c34", "ground": "#14171b"}
    | {"a": "#56b4e9", "b": "#f0a04b", "c": "#3fd0a4"},
}


def save(name: str, draw: Callable[[Figure, dict[str, str]], None], size: tuple[float, float], folder: Path) -> None:
    """Draw once in each palette, without ground, into `<name>-light.svg` and `<name>-dark.svg`.

    Args:
        name (`str`): of the figure.
        draw (`Callable`): makes the axes, from an empty figure and the colours.
        size (`tuple[float, float]`): in inches.
        folder (`Path`): where the files go.
    """
    # text stays text (it can be read aloud and searched), and the same figure makes the same file
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "font.family": "sans-serif"}
    for mode, colours in COLOURS.items():
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        draw(figure, colours)
        for axes in figure.axes:
            dress(axes, colours)
        path = folder / f"{name}-{mode}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
        path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def dress(axes: Axes, colours: dict[str, str]) -> None:
    """Give ticks, spines and texts the colours of the palette."""
    axes.set_facecolor("none")
    axes.tick_params(colors=colours["muted"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(colours["line"])
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(colours["text"])
