"""Line plots for the report: SVG that follows the page's colours, PNG for Markdown."""

import io
import re
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

# After Okabe and Ito: colours that stand out on white and on black, told apart by the colour-blind
_COLOURS = ("#1F83CC", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_INK = "#010203"  # replaced by currentColor in SVG


@dataclass(frozen=True)
class Curve:
    """A line plot.

    Attributes:
        title, x_label, y_label (`str`): texts.
        series (`dict[str, tuple[list[float], list[float]]]`): x and y values by name.
        reference_lines (`dict[str, float]`): horizontal lines by name (the teacher's value, say).
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[list[float], list[float]]]
    reference_lines: dict[str, float] = field(default_factory=dict)


def curve_svg(curve: Curve) -> str:
    """The plot as an inline SVG element with a transparent ground; text and axes in `currentColor`."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.family": "sans-serif"}):
        figure = _draw(curve, _INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # inline SVG in HTML needs no namespace
    svg = re.sub(r"\bfont: [^;\"']*?(\d[\d.]*px)[^;\"']*", r"font: \1 inherit; font-family: inherit", svg)
    return svg.replace("xlink:href", "href").replace(_INK, "currentColor")


def curve_png(curve: Curve) -> bytes:
    """The plot as a PNG with a white ground."""
    buffer = io.BytesIO()
    _draw(curve, "#1c2026").savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _draw(curve: Curve, ink: str) -> Figure:
    figure = Figure(figsize=(4.8, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for (name, (x, y)), colour in zip(curve.series.items(), _COLOURS, strict=False):
        axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker="o" if len(x) < 25 else None, markersize=3)
    for number, (name, value) in enumerate(curve.reference_lines.items()):
        axes.axhline(value, color=ink, linewidth=1.1, linestyle=("--", ":", "-.")[number % 3], alpha=0.75, label=name)
    axes.set_xlabel(curve.x_label, color=ink, fontsize=9)
    axes.set_ylabel(curve.y_label, color=ink, fontsize=9)
    axes.tick_params(colors=ink, labelsize=8)
    axes.grid(color=ink, alpha=0.13, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    if len(curve.series) + len(curve.reference_lines) > 1:
        axes.legend(frameon=False, labelcolor=ink, fontsize=8)
    return figure
