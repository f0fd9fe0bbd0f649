"""Plots of the report as SVG in the page's colours, and as PNG for Markdown."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from ..errors import UserError
from .calibration import CalibrationBin
from .statistics import MeanInterval

if TYPE_CHECKING:  # imported in functions: matplotlib is slow to import, and tables do not need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito: distinct for colour-blind readers and dark enough on white. `style.py` has the same colours for
# the light scheme and lighter versions for the dark scheme
COLOURS = ("#0072b2", "#b85c00", "#007a5a", "#b0478a", "#7a6500", "#5b4fc4")
# Coprime numbers of colours and markers: all 42 combinations occur before one repeats
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_INK = "#010203"
_PAGE_COLOURS = {_INK: "currentColor"} | {colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS)}
_LONGEST_LABEL = 30


@dataclass(frozen=True)
class Curve:
    """A line plot.

    Attributes:
        title, x_label, y_label (`str`): texts.
        series (`dict[str, tuple[list[float], list[float]]]`): x and y values by name; NaN leaves a gap.
        reference_lines (`dict[str, float]`): horizontal lines by name (such as the teacher's value).
        y_min (`float`, *optional*): lower end of the y axis; chosen from the data by default. Use 0 for shares, so
            that noise of a single completion does not look like a change.
        order (`Sequence[str]`): all names of the report, which give a name the same colour in all plots; by default
            the names of the series.
        intervals (`dict[str, tuple[list[float], list[float]]]`): lower and upper ends of the y values' intervals by
            name, for series with error bars.

    Raises:
        ValueError: if a series has different numbers of x and y values or ends of intervals, intervals have no series,
            or there are more names than distinct styles.
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[list[float], list[float]]]
    reference_lines: dict[str, float] = field(default_factory=dict)
    y_min: float | None = None
    order: Sequence[str] = ()
    intervals: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self.title, self.order or self.series)
        for name, (x, y) in self.series.items():
            if len(x) != len(y):
                raise ValueError(f"Series {name!r} of curve {self.title!r} has {len(x)} x and {len(y)} y values.")
        for name, ends in self.intervals.items():
            values = len(self.series[name][1]) if name in self.series else 0
            if {len(end) for end in ends} != {values}:
                raise ValueError(
                    f"Intervals of {name!r} in curve {self.title!r} have {len(ends[0])} lower and {len(ends[1])} "
                    f"upper ends for {values} values."
                )

    def draw(self, ink: str) -> "Figure":
        """Draw the plot, with axes and texts in the colour `ink`."""
        figure = _new_figure()
        axes = figure.add_subplot()
        for name, (x, y) in self.series.items():
            style = _line_style(self.order or list(self.series), name)
            if len(x) >= 25:
                style["marker"] = None
            axes.errorbar(x, y, self._errors(name), linewidth=1.8, elinewidth=1.1, label=_short(name), **style)
        for number, (name, value) in enumerate(self.reference_lines.items()):
            style = {"linestyle": ("--", ":", "-.")[number % 3], "linewidth": 1.1, "alpha": 0.75}
            axes.axhline(value, color=ink, label=_short(name), **style)
        axes.set_ylim(bottom=self.y_min)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        _finish(figure, ink, height=2.6)
        return figure

    def _errors(self, name: str) -> list[list[float]] | None:
        """Return the lengths of the error bars below and above the values; None for a series without."""
        if name not in self.intervals:
            return None
        values, (low, high) = self.series[name][1], self.intervals[name]
        below = [value - end for value, end in zip(values, low, strict=True)]
        above = [end - value for value, end in zip(values, high, strict=True)]
        return [[max(0.0, length) for length in lengths] for lengths in (below, above)]


@dataclass(frozen=True)
class Intervals:
    """Dot plot of means with intervals, grouped by category.

    Attributes:
        title, x_label (`str`): texts.
        categories (`list[str]`): labels of the groups, from the top.
        series (`dict[str, list[MeanInterval | None]]`): one mean per category, by name; None for a missing value.
        order (`Sequence[str]`): see [`Curve`].

    Raises:
        ValueError: if a series does not have one value per category, or there are more names than distinct styles.
    """

    title: str
    x_label: str
    categories: list[str]
    series: dict[str, list[MeanInterval | None]]
    order: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_names(self.title, self.order or self.series)
        for name, means in self.series.items():
            if len(means) != len(self.categories):
                raise ValueError(
                    f"Series {name!r} of {self.title!r} has {len(means)} values for {len(self.categories)} categories."
                )

    def draw(self, ink: str) -> "Figure":
        """Draw the plot, with axes and texts in the colour `ink`."""
        figure = _new_figure()
        axes = figure.add_subplot()
        pitch = len(self.series) + 1  # rows of a group, and an empty row after it
        for number, (name, means) in enumerate(self.series.items()):
            dots = [(row * pitch + number, mean) for row, mean in enumerate(means) if mean is not None]
            x = [mean.mean for _, mean in dots]
            errors = [[mean.mean - mean.low for _, mean in dots], [mean.high - mean.mean for _, mean in dots]]
            style = {**_line_style(self.order or list(self.series), name), "linestyle": "none"}
            rows = [row for row, _ in dots]
            axes.errorbar(x, rows, xerr=errors, elinewidth=1.6, label=_short(name), **style)
        middle = (len(self.series) - 1) / 2
        axes.set_yticks([row * pitch + middle for row in range(len(self.categories))], self.categories)
        axes.set_ylim(len(self.categories) * pitch - 1, -1)
        for row in range(1, len(self.categories)):
            axes.axhline(row * pitch - 1, color=ink, alpha=0.25, linewidth=0.7)
        axes.set_xlabel(self.x_label)
        _finish(figure, ink, height=0.8 + 0.17 * pitch * len(self.categories), grid="x")
        return figure


@dataclass(frozen=True)
class Reliability:
    """Reliability diagram: accuracy against confidence by bin, above a histogram of the predictions.

    Attributes:
        title (`str`): text.
        bins (`list[CalibrationBin]`): from low to high confidence.
        name (`str`): name of the model.
        order (`Sequence[str]`): see [`Curve`].

    Raises:
        ValueError: if there are more names than distinct styles.
    """

    title: str
    bins: list[CalibrationBin]
    name: str
    order: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_names(self.title, self.order)

    def draw(self, ink: str) -> "Figure":
        """Draw the plot, with axes and texts in the colour `ink`."""
        figure = _new_figure()
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        style = _line_style(self.order or [self.name], self.name)
        above.plot([0, 1], [0, 1], color=ink, linestyle="--", linewidth=1.1, alpha=0.75, label="calibrated")
        points = [(bin_.confidence, bin_.accuracy) for bin_ in self.bins]
        filled = [(confidence, accuracy) for confidence, accuracy in points if None not in (confidence, accuracy)]
        for confidence, accuracy in filled:  # the gap to the diagonal
            above.plot([confidence] * 2, [confidence, accuracy], color=style["color"], alpha=0.45)
        confidences, accuracies = [point[0] for point in filled], [point[1] for point in filled]
        above.plot(confidences, accuracies, linewidth=1.8, label=_short(self.name), **style)
        above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        widths = [bin_.high - bin_.low for bin_ in self.bins]
        counts = [bin_.count for bin_ in self.bins]
        below.bar(
            [bin_.low for bin_ in self.bins],
            counts,
            widths,
            align="edge",
            color=style["color"],
            alpha=0.55,
            linewidth=0,
        )
        below.set(xlabel="confidence", ylabel="prompts")
        _finish(figure, ink, height=3.1)
        return figure


Plot = Curve | Intervals | Reliability


def plot_svg(plot: Plot, name: str) -> str:
    """Return the plot as an inline SVG element with transparent background, in the colours of the page's style sheet.

    Args:
        plot (`Plot`): plot to draw.
        name (`str`): prefix of the element ids, unique within the page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        plot.draw(_INK).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        # Inline SVG in HTML needs no namespace
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        _adapt_attributes(element, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plot.title}
    return ElementTree.tostring(root, encoding="unicode")


def _adapt_attributes(element: ElementTree.Element, name: str) -> None:
    for key, value in element.attrib.items():
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = value.replace("#", f"#{name}-")
        elif key == "clip-path":
            value = value.replace("url(#", f"url(#{name}-")
        elif key == "style":
            for colour, page_colour in _PAGE_COLOURS.items():
                value = value.replace(colour, page_colour)
        element.attrib[key] = value


def plot_png(plot: Plot) -> bytes:
    """Return the plot with its title as a PNG with white background."""
    buffer, ink = io.BytesIO(), "#1c2026"
    figure = plot.draw(ink)
    figure.suptitle(plot.title, fontsize=10, color=ink, wrap=True, parse_math=False)
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _new_figure() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(layout="constrained")


def _check_names(title: str, names: Iterable[str]) -> None:
    number, limit = len(list(names)), math.lcm(len(COLOURS), len(_MARKERS))
    if number > limit:
        raise UserError(
            f"Plot {title!r} has {number} names, but only {limit} distinct styles. Compare fewer models at a time."
        )


def _line_style(names: Sequence[str], name: str) -> dict[str, Any]:
    number = list(names).index(name)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(COLOURS) % len(_DASHES)],
        "markersize": 4.5,
    }


def _short(name: str) -> str:
    """Shorten a label in the middle, since similar names often differ at their ends."""
    half = _LONGEST_LABEL // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[:half]}…{name[-half:]}"


def _finish(figure: "Figure", ink: str, height: float, grid: Literal["both", "x", "y"] = "both") -> None:
    """Set colours, grid, spines and size; put the legend below the axes, where it cannot cover lines."""
    from matplotlib.text import Text

    for axes in figure.axes:
        _finish_axes(axes, ink, grid)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = 3 if longest <= 8 else 2 if longest <= 16 else 1
    # A small figure, so that texts stay readable when the page scales it to a column
    figure.set_size_inches(3.7, height + 0.2 * math.ceil(len(labels) / columns))
    if labels:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=ink, fontsize=9
        )
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names may contain dollar signs


def _finish_axes(axes: "Axes", ink: str, grid: Literal["both", "x", "y"]) -> None:
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=10)
    axes.tick_params(colors=ink, labelsize=9)
    axes.grid(axis=grid, color=ink, alpha=0.13, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
