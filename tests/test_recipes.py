"""Every recipe is parsed by the parser of the subcommand that it is for, unknown keys refused."""

from pathlib import Path

import pytest

from minillm_trl.cli import minillm, sft
from minillm_trl.cli.arguments import parse

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
PARSERS = {"sft": sft.build_parser, "minillm": minillm.build_parser}


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.parent.name != "accelerate_configs"],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_recipe_is_parsed_and_names_its_launch_line(path: Path):
    subcommand = path.stem.split("_")[0]
    values, launch = parse(PARSERS[subcommand](), ["--config", str(path)])
    assert launch == {}
    assert values[0].dataset
    assert f"minillm-trl {subcommand} --config {path.relative_to(ROOT)}" in path.read_text()
