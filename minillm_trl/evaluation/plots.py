"""Line plots for the report: SVG that follows the page's colours, PNG for Markdown."""

import io
from dataclasses import dataclass, field
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

# After Okabe and Ito, told apart by the colour-blind and dark enough for white; `style.py` has the same ones for the
# light scheme and lighter ones for the dark
COLOURS = ("#0072b2", "#b85c00", "#007a5a", "#b0478a", "#7a6500", "#5b4fc4")
_INK = "#010203"
_PAGE_COLOURS = {_INK: "currentColor"} | {colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class Curve:
    """A line plot.

    Attributes:
        title, x_label, y_label (`str`): texts.
        series (`dict[str, tuple[list[float], list[float]]]`): x and y values by name.
        reference_lines (`dict[str, float]`): horizontal lines by name (the teacher's value, say).
        y_min (`float`, *optional*): where the y axis begins; from the data if not given. Shares begin at 0, so that
            one completion more or less does not look like a change.

    Raises:
        ValueError: if a series has unequal numbers of x and y values, or there are more series than colours.
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[list[float], list[float]]]
    reference_lines: dict[str, float] = field(default_factory=dict)
    y_min: float | None = None

    def __post_init__(self) -> None:
        if len(self.series) > len(COLOURS):
            raise ValueError(
                f"Curve {self.title!r} has {len(self.series)} series; at most {len(COLOURS)} can be told apart."
            )
        for name, (x, y) in self.series.items():
            if len(x) != len(y):
                raise ValueError(f"Series {name!r} of curve {self.title!r} has {len(x)} x and {len(y)} y values.")


def curve_svg(curve: Curve, name: str) -> str:
    """The plot as an inline SVG element with a transparent ground, in the colours of the page's style sheet.

    Args:
        curve ([`Curve`]): what to draw.
        name (`str`): prefix of the element's ids, which must be unique within a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        _draw(curve, _INK).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        # inline SVG in HTML needs no namespace
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        _adapt_attributes(element, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": curve.title}
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


def curve_png(curve: Curve) -> bytes:
    """The plot as a PNG with a white ground."""
    buffer = io.BytesIO()
    _draw(curve, "#1c2026").savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _draw(curve: Curve, ink: str) -> Figure:
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (name, (x, y)), colour in zip(curve.series.items(), COLOURS, strict=False):
        axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker="o" if len(x) < 25 else None, markersize=3)
    for number, (name, value) in enumerate(curve.reference_lines.items()):
        axes.axhline(value, color=ink, linewidth=1.1, linestyle=("--", ":", "-.")[number % 3], alpha=0.75, label=name)
    axes.set_ylim(bottom=curve.y_min)
    axes.set_xlabel(curve.x_label, color=ink, fontsize=10)
    axes.set_ylabel(curve.y_label, color=ink, fontsize=10)
    axes.tick_params(colors=ink, labelsize=9)
    axes.grid(color=ink, alpha=0.13, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    if curve.series or curve.reference_lines:
        # below the axes: never over the lines
        figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=ink, fontsize=9)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with dollar signs is a name, not a formula
    return figure
