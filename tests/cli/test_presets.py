"""Presets: each sets the fields that it names, a user's own fields win, and each has a recipe. Nothing is run."""

from pathlib import Path

import pytest
import yaml
from test_options import parsed

from minillm_trl import MiniLLMConfig
from minillm_trl.errors import UserError
from minillm_trl.presets import PRESETS, preset

RECIPES = Path(__file__).parents[2] / "recipes/e2e_demo"


def settings(config: MiniLLMConfig) -> dict:
    """All fields, except for objects that are made for each configuration."""
    return {name: value for name, value in config.to_dict().items() if name != "accelerator_config"}


def config_of(*words: str) -> MiniLLMConfig:
    return parsed("minillm", "--dataset_name", "rows", "--teacher", "t", *words)[MiniLLMConfig]


def written(folder: Path, **values) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


@pytest.mark.parametrize("name", PRESETS)
class TestEach:
    def test_it_equals_the_fields_that_it_names(self, name: str, tmp_path: Path):
        words = [part for field, value in PRESETS[name].items() for part in (f"--{field}", str(value))]
        expected = settings(config_of(*words))
        assert settings(config_of("--preset", name)) == expected
        assert settings(config_of("--config", written(tmp_path, preset=name))) == expected
        assert settings(config_of("--config", written(tmp_path, **PRESETS[name]))) == expected
        in_python = settings(MiniLLMConfig("out", use_cpu=True, bf16=False, **preset(name)))
        assert in_python == expected

    def test_it_prints_what_it_sets(self, name: str, capsys: pytest.CaptureFixture):
        config_of("--preset", name)
        said = capsys.readouterr().err
        assert f"preset {name}: " in said
        assert all(f"{field}={value}" in said for field, value in PRESETS[name].items())

    def test_it_changes_something_unless_it_is_the_default(self, name: str):
        assert (settings(config_of("--preset", name)) == settings(config_of())) == (name == "minillm")


class TestOwnFields:
    def test_command_line_wins_over_the_preset_and_is_named(self, capsys: pytest.CaptureFixture):
        config = config_of("--preset", "mixed_kl", "--forward_kl_share", "0.1", "--rkl_advantage", "true")
        assert (config.forward_kl_share, config.rkl_advantage) == (0.1, True)
        assert config.single_step_divergence == "mixed_kl"
        said = capsys.readouterr().err
        assert "forward_kl_share=" not in said
        assert "Your own rkl_advantage, forward_kl_share instead of the preset's." in said

    def test_yaml_wins_over_the_preset_even_with_the_default(self, tmp_path: Path):
        path = written(tmp_path, preset="opd", teacher_mixed_alpha=0.2)
        assert config_of("--config", path).teacher_mixed_alpha == 0.2

    def test_preset_of_the_command_line_replaces_the_file_s(self, tmp_path: Path):
        config = config_of("--config", written(tmp_path, preset="gkd"), "--preset", "distillm")
        assert config.single_step_divergence == "skewed_reverse_kl"

    def test_python_s_own_fields_win(self):
        assert preset("gkd", jsd_beta=0.1)["jsd_beta"] == 0.1


@pytest.mark.parametrize("words", [["--preset", "gdk"], None])
def test_unknown_name_is_refused(words: list[str] | None, tmp_path: Path):
    words = words or ["--config", written(tmp_path, preset="gdk")]
    with pytest.raises(UserError, match="gdk"):
        config_of(*words)
    with pytest.raises(UserError, match="preset must be one of"):
        preset("gdk")


def test_each_preset_has_a_recipe_that_keeps_its_fields():
    for name in PRESETS.keys() - {"minillm"}:
        values = yaml.safe_load((RECIPES / f"minillm_{name}.yaml").read_text())
        assert values["preset"] == name
        assert {field: values[field] for field in PRESETS[name].keys() & values.keys()}.items() <= PRESETS[
            name
        ].items()
    plain = yaml.safe_load((RECIPES / "minillm.yaml").read_text())
    assert {field: plain.get(field, value) for field, value in PRESETS["minillm"].items()} == PRESETS["minillm"]
