"""Scripts that run alone: their inline metadata is that of the package, and they train."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ENVIRONMENT
from packaging.requirements import Requirement
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# the regular expression of the specification of inline script metadata
BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def metadata(path: Path) -> dict:
    (found,) = [match for match in BLOCK.finditer(path.read_text()) if match["type"] == "script"]
    lines = found["content"].splitlines()
    return tomllib.loads("\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def test_there_is_one():
    assert [path.name for path in SCRIPTS] == ["distil.py"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
class TestMetadata:
    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def test_ranges_are_those_of_the_package(self, path: Path):
        found = metadata(path)
        assert found["requires-python"] == self.PROJECT["requires-python"]
        ranges = {each.name: each.specifier for each in map(Requirement, self.PROJECT["dependencies"])}
        for requirement in map(Requirement, found["dependencies"]):
            if requirement.name != self.PROJECT["name"]:
                assert requirement.specifier == ranges[requirement.name]

    def test_what_it_imports_is_what_it_requires(self, path: Path):
        required = {Requirement(line).name.replace("-", "_") for line in metadata(path)["dependencies"]}
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported - set(sys.stdlib_module_names) == required

    def test_the_package_is_taken_from_the_clone(self, path: Path):
        """It is not on the package index."""
        (source,) = metadata(path)["tool"]["uv"]["sources"].items()
        assert source[0] == self.PROJECT["name"]
        assert (path.parent / source[1]["path"]).resolve() == ROOT


@pytest.mark.cli
def test_distil_trains_the_student(tmp_path: Path, model_dir):
    student, teacher = model_dir("llama", 0), model_dir("llama", 1, 48)
    prompts = [{"prompt": f"the mill {number}"} for number in range(72)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    script = ROOT / "examples" / "distil.py"
    words = ["--student", student, "--teacher", teacher, "--prompts", tmp_path / "prompts.jsonl"]
    words += ["--output_dir", tmp_path / "run", "--max_steps", "8", "--learning_rate", "0.01"]
    command = [sys.executable, script, *words, "--max_completion_length", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ((before, after),) = re.findall(r"reverse KL per token +([\d.]+) -> ([\d.]+)", result.stdout)
    assert float(after) < float(before)
    assert [line.split(":")[0] for line in result.stdout.splitlines()[-4:]] == ["before"] * 2 + ["after"] * 2
    weights = [load_file(Path(folder) / "model.safetensors") for folder in (student, tmp_path / "run")]
    assert any(not weights[0][name].equal(weights[1][name]) for name in weights[0])
