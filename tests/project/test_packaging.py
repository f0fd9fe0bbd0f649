"""The package's metadata, its licences, and the launch configurations that ship with it."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import version_matrix
from packaging.requirements import Requirement
from packaging.version import Version

import minillm_trl
from minillm_trl.cli import SUBCOMMANDS
from minillm_trl.cli.launch import accelerate_config_path
from minillm_trl.cli.recipe import recipe_path

ROOT = Path(minillm_trl.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_public_names_can_be_imported():
    for name in minillm_trl.__all__:
        assert getattr(minillm_trl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MiniLLM'"):
        _ = minillm_trl.MiniLLM


@pytest.mark.parametrize("name", ["cpu", "v100"])
def test_constraints_lie_in_the_declared_ranges(name: str):
    project = PROJECT["project"]
    extras = [
        requirement
        for extra in ("deepspeed", "dev", "docs", "eval", "judge", "server")
        for requirement in project["optional-dependencies"][extra]
    ]
    requirements = map(Requirement, [*project["dependencies"], *extras])
    declared = {requirement.name: requirement.specifier for requirement in requirements}
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {"torch", "trl", "transformers"} <= {pin.name for pin in pins}
    for pin in pins:
        for part in pin.specifier:
            if part.operator == "==":
                assert declared[pin.name].contains(part.version), pin


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_names_every_target():
    listed = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+) ", listed, re.MULTILINE)) == {*targets.split()} - {"help"}


def test_data_ships_with_its_attribution():
    folder = ROOT / "minillm_trl" / "data" / "e2e_nlg"
    text = (folder / "ATTRIBUTION.md").read_text()
    assert "CC BY-SA 4.0" in text
    assert "Novikova" in text
    assert (ROOT / "minillm_trl" / "py.typed").is_file()


class TestReadme:
    TEXT = (ROOT / "README.md").read_text()

    def test_is_short_and_has_its_parts_in_order(self):
        assert len(self.TEXT.splitlines()) <= 200
        parts = ["\n![", "\n```bash\nmake demo", "\n```python\n", "\n```yaml\n", "**wins**", "## What works where"]
        found = [self.TEXT.index(part) for part in parts]
        assert found == sorted(found)

    def test_rouge_l_of_the_methods_is_that_of_the_results(self):
        rows = json.loads((ROOT / "benchmarks/results/quality_e2e.json").read_text())["results"]["rows"]
        (line,) = re.findall(r"^\| \*\*wins\*\* at temperature 1 \|.*", self.TEXT, flags=re.MULTILINE)
        written = re.findall(r"\b\d\d\.\d\b", line)
        assert written == [f"{rows[name]['measures']['rouge_l'][0]:.1f}" for name in ("minillm", "sft", "kd", "seqkd")]
        gaps = [-rows[name]["minillm_minus"]["reverse_kl"][0] for name in ("sft", "kd", "seqkd")]
        assert f"Reverse KL is {min(gaps):.1f} to {max(gaps):.1f} nats lower" in line

    def test_leads_where_people_decode_are_those_of_the_results(self):
        rows = json.loads((ROOT / "benchmarks/results/frontier_e2e.json").read_text())["results"]["rows"]

        def lead(rival: str, measure: str, name: str = "low_variance_cool") -> str:
            mean, low, high = rows[name]["minus"][rival][measure]
            return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

        def written(row: str) -> str:
            (line,) = re.findall(rf"^\| {re.escape(row)} \|.*", self.TEXT, flags=re.MULTILINE)
            return line.replace(" Rouge-L [", " [")

        line = written("**wins** where people decode")
        assert (
            f"started from by {lead('sft_student', 'tuned_rouge_l')}, SFT continued by {lead('sft', 'tuned_rouge_l')}"
            in line
        )
        assert f"`DistillationTrainer` trained at 0.55 by {lead('distillation_cool', 'tuned_rouge_l')}" in line
        assert f"(at equal entropy by {lead('distillation_cool', 'equal_entropy_rouge_l')})" in line
        assert f"(the single step alone) by {lead('single_step_cool', 'equal_entropy_rouge_l')}" in line
        tied = [
            name for name in rows if name.endswith("_cool") and name not in ("low_variance_cool", "single_step_cool")
        ]
        tied.remove("low_variance_normalised_cool")  # a setting of the same method
        assert all(rows[name]["minus"]["single_step_cool"]["equal_entropy_rouge_l"][1] <= 0 for name in tied)
        assert f"[{len(tied)} other methods trained at 0.55]" in line
        line = written("**no difference** at equal entropy")
        assert f"(+{lead('sft', 'equal_entropy_rouge_l', 'minillm')})" in line

    def test_links_lead_to_files(self):
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", self.TEXT) if not link.startswith("http")]
        assert len(links) > 8
        assert [link for link in links if not (ROOT / link).exists()] == []

    def test_python_example_uses_fields_that_exist(self):
        (code,) = re.findall(r"```python\n(.*?)```", self.TEXT, flags=re.DOTALL)
        calls = {
            node.func.id: {keyword.arg for keyword in node.keywords}
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert calls["MiniLLMConfig"] <= {field.name for field in fields(minillm_trl.MiniLLMConfig)}
        assert calls["MiniLLMTrainer"] <= set(inspect.signature(minillm_trl.MiniLLMTrainer.__init__).parameters)

    def test_commands_name_subcommands_and_launch_configurations_that_exist(self):
        for name in re.findall(r"minillm-trl ([\w-]+)", self.TEXT):
            assert name in SUBCOMMANDS
        for name in re.findall(r"--accelerate_config (\w+)", self.TEXT):
            assert accelerate_config_path(name).is_file()
        # in code only: the answers of models have the word "make", too
        targets = re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", self.TEXT, flags=re.MULTILINE)
        assert {"demo", "test"} <= {name for target in targets for name in target}
        for name in filter(None, (name for target in targets for name in target)):
            assert f"\n{name}:" in (ROOT / "Makefile").read_text()


class TestVersions:
    RESULTS = json.loads((ROOT / "docs/version_matrix.json").read_text())
    TEXT = (ROOT / "docs/versions.md").read_text()

    def test_table_is_that_of_the_results(self):
        ends = [self.RESULTS[name]["versions"] for name in ("lowest", "newest")]
        for package in ends[0]:
            assert f"| {package} | {ends[0][package]} | {ends[1][package]} |" in self.TEXT
        passed = [str(self.RESULTS[name]["result"]["passed"]) for name in ("lowest", "newest")]
        assert f"| tests passed | {' | '.join(passed)} |" in self.TEXT

    @pytest.mark.parametrize("end", ["lowest", "newest"])
    def test_every_listed_file_ran_and_passed(self, end: str):
        tests = self.RESULTS[end]["tests"]
        assert {*tests} == {*version_matrix.TESTS}
        assert all(version_matrix.passed(counts) for counts in tests.values())
        assert self.RESULTS[end]["result"] == version_matrix.total(tests.values())
        assert f"{len(tests)} test files" in self.TEXT

    def test_lowest_versions_are_the_lower_bounds(self):
        lowest = self.RESULTS["lowest"]["versions"]
        for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
            bounds = [part.version for part in requirement.specifier if part.operator == ">="]
            if requirement.name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
                assert Version(lowest[requirement.name]).release[:2] == Version(bounds[0]).release[:2]

    def test_newest_versions_are_accepted(self):
        newest = self.RESULTS["newest"]["versions"]
        for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
            if requirement.name in newest:
                assert requirement.specifier.contains(newest[requirement.name]), requirement


class TestResolvedVersions:
    RESULTS = json.loads((ROOT / "docs/resolved_versions.json").read_text())
    TEXT = (ROOT / "docs/versions.md").read_text()

    def test_every_extra_was_tried_with_both_ends_of_transformers(self):
        extras = {"no extra", *PROJECT["project"]["optional-dependencies"]}
        lowest, newest = self.RESULTS["transformers"]
        assert {*self.RESULTS["extras"]} == extras
        assert all({lowest, newest} <= {*found} for found in self.RESULTS["extras"].values())
        (bounds,) = [
            each.specifier
            for each in map(Requirement, PROJECT["project"]["dependencies"])
            if each.name == "transformers"
        ]
        assert bounds.contains(lowest)
        assert bounds.contains(newest)

    def test_table_is_that_of_the_results(self):
        def cell(found: dict) -> str:
            if not found["packages"]:
                reasons = (line for line in found["conflict"] if not line.startswith(("The user", "minillm-trl")))
                return f"no: {next(reasons)}"
            names = [name for name in ("torch", "vllm", "deepspeed", "openai", "aiohttp") if name in found]
            return f"{found['packages']} packages: " + ", ".join(f"{name} {found[name]}" for name in names)

        ends = self.RESULTS["transformers"]
        for extra, found in self.RESULTS["extras"].items():
            cells = " | ".join(cell(found[version]) for version in ends)
            assert f"| {extra} | {cells} |" in self.TEXT, f"| {extra} | {cells} |"
            if "any" in found:
                assert (
                    f"pip takes vLLM {found['any']['vllm']} with transformers {found['any']['transformers']}"
                    in self.TEXT
                )

    def test_trl_and_transformers_stay_as_they_are(self):
        found = self.RESULTS["beside_trl"]
        assert [*found] == self.RESULTS["transformers"]
        assert all(entry["changed"] == [] and entry["added"] > 0 for entry in found.values())


def test_a_workflow_runs_targets_that_exist():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    targets = re.findall(r"run: make ([\w-]+)", text)
    assert {"lint", "test", "package", "docs", "test-matrix"} == {*targets}
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


def test_recipes_are_found_by_name_outside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dolly_toy", "recipes/dolly_toy"):
        assert (recipe_path(Path(name)) / "recipe.yaml").is_file()
    assert recipe_path(Path("other/dolly_toy")) == Path("other/dolly_toy")
    (tmp_path / "dolly_toy").mkdir()
    assert recipe_path(Path("dolly_toy")) == Path("dolly_toy")
