"""The plots show the data that they are given, in one colour for each model."""

import math
import re

import matplotlib.colors
import pytest
from matplotlib.axes import Axes

from minillm_trl.evaluation.calibration import CalibrationBin
from minillm_trl.evaluation.plots import COLOURS, Curve, Intervals, Reliability, plot_png, plot_svg
from minillm_trl.evaluation.statistics import MeanInterval

NAMES = ["teacher", "sft", "minillm"]


def colours(axes: Axes) -> dict[str, str]:
    """Colour by label."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {label: matplotlib.colors.to_hex(line.get_color()) for label, line in zip(labels, lines, strict=True)}


def interval(mean: float, low: float, high: float) -> MeanInterval:
    return MeanInterval(mean, low, high, 100, None)


class TestCurve:
    def test_lines_are_the_series_and_the_reference(self):
        curve = Curve("T", "x", "y", {"minillm": ([1.0, 2.0, 3.0], [5.0, math.nan, 7.0])}, {"teacher": 4.0}, y_min=0.0)
        (axes,) = curve.draw("#000000").axes
        line, reference = axes.get_lines()
        assert line.get_xdata().tolist() == [1.0, 2.0, 3.0]
        assert line.get_ydata().tolist() == pytest.approx([5.0, math.nan, 7.0], nan_ok=True)
        assert list(reference.get_ydata()) == [4.0, 4.0]
        assert axes.get_ylim()[0] == 0.0
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")

    def test_a_name_has_its_colour_whatever_else_is_drawn(self):
        point = ([0.0], [0.0])
        all_of_them = Curve("T", "x", "y", dict.fromkeys(NAMES, point), order=NAMES).draw("#000000").axes[0]
        one = Curve("T", "x", "y", {"minillm": point}, order=NAMES).draw("#000000").axes[0]
        assert colours(all_of_them) == dict(zip(NAMES, COLOURS, strict=False))
        assert colours(one) == {"minillm": COLOURS[2]}

    def test_more_names_than_colours_differ_in_marker_or_dashes(self):
        names = [str(number) for number in range(42)]
        series = {name: ([0.0, 1.0], [0.0, 1.0]) for name in names}
        lines = Curve("Many", "x", "y", series).draw("#000000").axes[0].get_lines()
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 42
        with pytest.raises(ValueError, match=r"'Many' has 43 names, .* 42 "):
            Curve("Many", "x", "y", {**series, "one more": ([0.0], [0.0])})

    def test_unequal_x_and_y_are_refused(self):
        with pytest.raises(ValueError, match=r"'a' of curve 'T' has 2 x and 1 y"):
            Curve("T", "x", "y", {"a": ([0.0, 1.0], [0.0])})

    def test_error_bars_span_the_intervals(self):
        series = {"a": ([0.0, 1.0], [5.0, 7.0]), "b": ([0.0], [1.0])}
        # the second interval does not contain its mean, which a skewed bootstrap distribution allows
        curve = Curve("T", "x", "y", series, intervals={"a": ([4.0, 7.5], [5.5, 9.0])})
        (bars,) = curve.draw("#000000").axes[0].collections
        ends = [[tuple(point) for point in segment] for segment in bars.get_segments()]
        assert ends == [[(0.0, 4.0), (0.0, 5.5)], [(1.0, 7.0), (1.0, 9.0)]]

    @pytest.mark.parametrize("intervals", [{"a": ([0.0], [1.0, 2.0])}, {"a": ([], [])}, {"b": ([0.0], [1.0])}])
    def test_intervals_that_do_not_fit_the_series_are_refused(self, intervals: dict):
        with pytest.raises(ValueError, match=r"Intervals of '[ab]' in curve 'T'"):
            Curve("T", "x", "y", {"a": ([0.0], [0.5])}, intervals=intervals)

    def test_long_name_keeps_both_ends(self):
        name = "qwen2.5-0.5b-from-7b-minillm-with-anchors-seed-2"
        figure = Curve("T", "x", "y", {name: ([0.0], [0.0])}).draw("#000000")
        assert list(colours(figure.axes[0])) == ["qwen2.5-0.5b-fr…-anchors-seed-2"]


class TestIntervals:
    def test_dots_and_lines_are_the_means_and_intervals_from_above(self):
        series = {
            "sft": [interval(20.0, 18.0, 23.0), interval(15.0, 14.0, 16.0)],
            "minillm": [interval(24.0, 22.0, 25.0), None],
        }
        plot = Intervals("T", "Rouge-L", ["dolly", "vicuna"], series, NAMES)
        (axes,) = plot.draw("#000000").axes
        bars = [(bar[0].get_xdata().tolist(), bar[0].get_ydata().tolist(), bar[2][0]) for bar in axes.containers]
        assert [(x, y) for x, y, _ in bars] == [([20.0, 15.0], [0, 3]), ([24.0], [1])]
        ends = [[segment[:, 0].tolist() for segment in lines.get_segments()] for _, _, lines in bars]
        assert ends == [[[18.0, 23.0], [14.0, 16.0]], [[22.0, 25.0]]]
        assert axes.yaxis_inverted()
        assert [label.get_text() for label in axes.get_yticklabels()] == ["dolly", "vicuna"]
        assert axes.get_yticks().tolist() == [0.5, 3.5]  # in the middle of the group
        assert colours(axes) == {"sft": COLOURS[1], "minillm": COLOURS[2]}

    def test_missing_category_is_refused(self):
        with pytest.raises(ValueError, match="'sft' of 'T' has 1 values for 2 categories"):
            Intervals("T", "x", ["a", "b"], {"sft": [None]})


class TestReliability:
    def test_points_are_bins_with_predictions_and_bars_all_counts(self):
        bins = [
            CalibrationBin(0.0, 0.5, 0, None, None),
            CalibrationBin(0.5, 0.75, 10, 0.6, 0.5),
            CalibrationBin(0.75, 1.0, 30, 0.9, 0.7),
        ]
        above, below = Reliability("T", bins, "minillm", NAMES).draw("#000000").axes
        lines = {line.get_label(): line for line in above.get_lines()}
        assert lines["minillm"].get_xdata().tolist() == [0.6, 0.9]
        assert lines["minillm"].get_ydata().tolist() == [0.5, 0.7]
        assert list(lines["calibrated"].get_xdata()) == list(lines["calibrated"].get_ydata()) == [0, 1]
        assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in below.patches] == [
            (0.0, 0.5, 0),
            (0.5, 0.25, 10),
            (0.75, 0.25, 30),
        ]
        assert colours(above)["minillm"] == COLOURS[2]


@pytest.mark.parametrize(
    "plot",
    [
        Curve("A", "x", r"$\nosuchcommand$", {"$5 student": ([0.0, 1.0], [0.0, 1.0])}),
        Intervals("B", "x", ["dolly"], {"sft": [interval(1.0, 0.5, 2.0)]}),
        Reliability("C", [CalibrationBin(0.0, 1.0, 3, 0.6, 0.5)], "sft"),
    ],
    ids=lambda plot: plot.title,
)
class TestFiles:
    def test_svg_has_the_page_s_colours_and_ids_of_its_own(self, plot):
        svg = plot_svg(plot, "fig")
        assert "currentColor" in svg
        assert "var(--series-0)" in svg
        assert not re.search(r"#010203|fill: (#000000|black|white|#ffffff)", svg)
        assert all(found.startswith("fig-") for found in re.findall(r'id="([^"]+)"', svg))
        assert f'aria-label="{plot.title}"' in svg
        assert svg == plot_svg(plot, "fig")

    def test_png_is_the_same_each_time(self, plot):
        assert plot_png(plot).startswith(b"\x89PNG")
        assert plot_png(plot) == plot_png(plot)
