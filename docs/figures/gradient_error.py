"""How far the expected gradient of each variant of the loss is from that of the reverse KL, by enumeration.

    python docs/figures/gradient_error.py

The example and the expectations are those of `tests/method/test_exact_gradient.py`: four tokens, four steps, float64.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from style import FOLDER, save

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from tabular import relative_error  # in tests/, which is no package
from test_exact_gradient import FIXED, exact_gradient, expected_gradient

VARIANTS = {
    "single step + future rewards (Eq. 3)": {},
    "single step alone": {"long_term": False},
    "current reward counted twice": {"include_current": True},
    "mixed, a weight for each token (Eq. 5, default)": {"alpha": 0.2, "weighting": "token"},
    "mixed, weights of the prefix": {"alpha": 0.2, "weighting": "prefix"},
    "mixed, weights of the sequence": {"alpha": 0.2, "weighting": "sequence"},
}


def errors() -> dict[str, float]:
    """Relative error of each variant."""
    exact = exact_gradient(FIXED)
    return {name: relative_error(expected_gradient(FIXED, **options), exact) for name, options in VARIANTS.items()}


def main(folder: Path = FOLDER) -> None:
    found = errors()

    def draw(figure: Figure, colours: dict[str, str]) -> None:
        axes = figure.subplots()
        for row, error in enumerate(found.values()):
            axes.barh(row, 100 * error, height=0.6, color=colours["b" if error > 1e-9 else "c"])
            written = f"{100 * error:.0f} %" if error > 1e-9 else "exact (below 1e-9)"
            axes.text(100 * error + 1.0, row, written, va="center", color=colours["text"])
        axes.set_yticks(range(len(found)), list(found), color=colours["text"])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("error of the expected gradient, % of its norm")

    save("gradient_error", draw, (8.0, 2.9), folder)


if __name__ == "__main__":
    main()
