"""What the documentation names exists, its code runs, its figures come from their scripts, and the site builds."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import minillm_trl
from minillm_trl import MiniLLMConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
SCRIPTS = sorted(path.stem for path in FIGURES.glob("*.py") if "def main(folder" in path.read_text())
sys.path[:0] = [str(FIGURES), str(DOCS / "mkdocs")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_each_tool_that_is_compared_has_a_version_and_a_source():
    versions, *others = (DOCS / "other_tools.md").read_text().split("\n## ")
    rows = [line.split(" | ") for line in versions.splitlines() if line.startswith("| ")][1:]
    listed = {name.removeprefix("TRL ") for row in rows for name in row[0].removeprefix("| ").split(", ")}
    assert all(len(row) == 3 and row[1] and ("the same" in row[2] or "](https://" in row[2]) for row in rows)
    named = re.findall(r"^\| (?!\*\*minillm_trl)([^|]+) \| ", "\n".join(others), flags=re.MULTILINE)
    assert len(named) > 20
    assert {name.removeprefix("TRL ") for cell in named for name in cell.split(", ")} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
class TestPage:
    def test_links_lead_somewhere(self, page: Path):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            if anchor and file.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, target

    def test_names_that_link_to_a_module_are_defined_there(self, page: Path):
        for name, target in re.findall(r"\[`(\w+)`\]\(([^)#]+\.py)\)", page.read_text()):
            code = (page.parent / target).read_text()
            assert re.search(rf"^(def|class) {name}\b", code, flags=re.MULTILINE), (name, target)

    def test_tests_and_files_that_it_names_exist(self, page: Path):
        text = page.read_text()
        for name in set(re.findall(r"`(test_\w+)`", text)) - {"test_rows", "test_split_size"}:  # options
            assert f"def {name}(" in TESTS, name
        for name in re.findall(r"`((?:tests|recipes|benchmarks|docs|minillm_trl)/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), name

    def test_blocks_of_code_are_code(self, page: Path):
        text = page.read_text()
        for block in blocks(text, "python"):
            compile(block, page.name, "exec")
        for block in blocks(text, "yaml"):
            assert yaml.safe_load(block)
        for block in blocks(text, "json"):
            for line in block.splitlines():
                json.loads(line)
        assert text.count("```") % 2 == 0

    def test_each_figure_is_there_for_light_and_dark_with_a_description(self, page: Path):
        found = re.findall(
            r"!\[([^\]]*)\]\((\S*figures/\w+)-(light|dark)\.svg#gh-(light|dark)-mode-only\)", page.read_text()
        )
        assert len(found) == page.read_text().count(".svg#")
        modes = {}
        for description, name, mode, shown_in in found:
            assert mode == shown_in
            modes.setdefault((description, name), []).append(mode)
        assert all(description and schemes == ["light", "dark"] for (description, _), schemes in modes.items())


def test_settings_near_the_former_trainer_are_accepted():
    text = (DOCS / "migrating_from_trl.md").read_text()
    (call,) = re.findall(r"^(MiniLLMConfig\(.+\))$", text, flags=re.MULTILINE)
    config = eval(call, {"MiniLLMConfig": lambda **options: MiniLLMConfig("unused", use_cpu=True, **options)})
    assert config.gamma == 0.0
    assert config.include_current_reward


def test_recipe_on_its_page_is_the_smallest_one():
    (block,) = blocks((DOCS / "recipes.md").read_text(), "yaml")
    assert yaml.safe_load(block) == yaml.safe_load((ROOT / "recipes/dolly_toy/recipe.yaml").read_text())


class TestFigures:
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_script_makes_the_files_that_are_there(self, name: str, tmp_path: Path):
        import_module(name).main(tmp_path)
        made = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert set(made) == {f"{name}-{mode}.svg" for mode in ("light", "dark")}
        for file, text in made.items():
            there = (FIGURES / file).read_text()
            # words and numbers; coordinates are matplotlib's, and change with its version
            assert re.findall(r">([^<>\n]+)</text>", text) == re.findall(r">([^<>\n]+)</text>", there)
        assert made[f"{name}-light.svg"] != made[f"{name}-dark.svg"]

    def test_each_picture_has_a_script(self):
        pictures = {path.stem.rsplit("-", 1)[0] for path in FIGURES.glob("*.svg")}
        assert pictures == set(SCRIPTS)

    def test_errors_of_the_gradient_are_those_that_the_text_names(self):
        errors = import_module("gradient_error").errors()
        text = (DOCS / "method.md").read_text()
        wrong = [error for error in errors.values() if error > 1e-9]
        assert (round(100 * min(wrong)), round(100 * max(wrong)), len(errors) - len(wrong)) == (11, 84, 2)
        assert text.count(" 11 to 84 % ") == 2  # the figure's description, for light and dark

    def test_reverse_kl_keeps_to_the_larger_mode_and_forward_kl_covers_both(self):
        script = import_module("forward_and_reverse_kl")
        (mean, deviation), (wide_mean, wide_deviation) = script.fit(reverse=True), script.fit(reverse=False)
        assert (mean, deviation) == (pytest.approx(-2.0, abs=0.1), pytest.approx(0.8, abs=0.1))
        # the forward KL is least at the moments of the teacher
        moments = [float((script.TEACHER * script.GRID**n).sum() * script.STEP) for n in (1, 2)]
        assert wide_mean == pytest.approx(moments[0], abs=0.05)
        assert wide_deviation == pytest.approx((moments[1] - moments[0] ** 2) ** 0.5, abs=0.05)

    def test_tables_of_memory_and_speed_are_those_of_the_results(self):
        script = import_module("memory_and_speed")
        assert script.PAGE.read_text() == script.written(script.PAGE.read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; a broken link, anchor or reference ends the build."""
    pytest.importorskip("mkdocstrings", reason="the site needs `pip install -e .[docs]`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


class TestSite:
    def test_every_page_is_in_the_navigation(self):
        def pages(entry) -> list[str]:
            if isinstance(entry, str):
                return [entry]
            return [page for item in (entry.values() if isinstance(entry, dict) else entry) for page in pages(item)]

        listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
        assert len(set(listed)) == len(listed)
        assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(listed)

    @pytest.mark.cli
    def test_front_page_shows_the_picture_and_a_tab_for_each_way_to_begin(self, site: Path):
        text = (site / "index.html").read_text()
        assert (site / re.search(r'<img [^>]*src="([^"]+)"', text)[1]).is_file()
        (labels,) = re.findall(r'<div class="tabbed-labels">(.*?)</div>', text, flags=re.DOTALL)
        assert re.findall(r">([^<>]+)</label>", labels)[:3] == ["Python", "YAML", "Notebook"]

    @pytest.mark.cli
    def test_links_to_code_lead_to_the_reference_and_others_to_copies(self, site: Path):
        method = (site / "method/index.html").read_text()
        assert 'href="../api/objectives/#minillm_trl.divergences.reverse_kl"' in method
        assert 'href="../tests/method/test_exact_gradient.py"' in method
        assert (site / "tests/method/test_exact_gradient.py").is_file()
        assert 'id="minillm_trl.divergences.reverse_kl"' in (site / "api/objectives/index.html").read_text()
        # from a page outside docs/ into it, and to the README, whose place on the site is another
        assert 'href="../launching/"' in (site / "recipes/index.html").read_text()
        assert 'href="../front_page/#what-works-where"' in (site / "faq/index.html").read_text()

    @pytest.mark.cli
    def test_formulas_of_pages_and_docstrings_are_marked_for_katex(self, site: Path):
        assert (site / "method/index.html").read_text().count('<div class="arithmatex">') == len(
            blocks((DOCS / "method.md").read_text(), "math")
        )
        assert '<div class="arithmatex">\\[' in (site / "api/objectives/index.html").read_text()
        assert (site / "assets/katex/katex.min.js").stat().st_size > 200_000

    @pytest.mark.cli
    def test_nothing_is_loaded_from_elsewhere(self, site: Path):
        for page in site.rglob("*.html"):
            text = page.read_text()
            assert not re.search(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//', text), page
            assert not re.search(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//', text), page

    def test_docstrings_become_lists_and_references_links(self):
        pytest.importorskip("griffe", reason="the reference needs `pip install -e .[docs]`")
        docstring = (
            "What [`reverse_kl`] does, see [`~trl.GRPOTrainer`].\n\nArgs:\n    a, b (`torch.Tensor` of shape `(B, T)`)"
            ": one\n        and two.\n    c (`float`, *optional*): three.\n\nReturns:\n    `int`: one: two.\n\n"
            "Raises:\n    ValueError: if not."
        )
        paths = {"reverse_kl": "minillm_trl.objectives.reverse_kl"}
        text = import_module("docstrings").to_markdown(docstring, lambda name: paths.get(name, name))
        assert (
            "- `a`, `b` (`torch.Tensor` of shape `(B, T)`): one\n    and two.\n- `c` (`float`, *optional*): three."
            in text
        )
        assert "**Returns**\n\n`int`: one: two." in text
        assert "**Raises**\n\n- `ValueError`: if not." in text
        assert (
            '<autoref identifier="minillm_trl.objectives.reverse_kl" optional><code>reverse_kl</code></autoref>'
            in text
        )
        assert "<code>GRPOTrainer</code>" in text


class TestProjectFiles:
    def test_a_bug_report_asks_for_the_doctor_and_the_record_of_the_run(self):
        body = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())["body"]
        labels = [field["attributes"]["label"] for field in body]
        assert any("minillm-trl doctor" in label for label in labels)
        assert any("run.json" in label for label in labels)

    @pytest.mark.parametrize("name", ["bug", "feature", "question"])
    def test_issue_template_is_whole(self, name: str):
        template = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        assert {"name", "description", "labels", "body"} <= set(template)
        assert any(field.get("validations", {}).get("required") for field in template["body"])

    def test_citation_has_the_packages_version_and_licence_and_the_paper(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert citation["version"] == minillm_trl.__version__
        assert citation["license"] == "Apache-2.0"
        assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2306.08543"
