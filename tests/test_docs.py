"""What the documentation names exists, and its code runs."""

import re
from pathlib import Path

import pytest

from minillm_trl import MiniLLMConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
class TestPage:
    def test_links_lead_somewhere(self, page: Path):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, target

    def test_tests_and_files_that_it_names_exist(self, page: Path):
        text = page.read_text()
        for name in set(re.findall(r"`(test_\w+)`", text)) - {"test_rows"}:  # an option of prepare-data
            assert f"def {name}(" in TESTS, name
        for name in re.findall(r"`((?:tests|recipes|benchmarks|docs|minillm_trl)/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), name

    def test_python_blocks_compile(self, page: Path):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            compile(block, page.name, "exec")


def test_settings_near_the_former_trainer_are_accepted():
    text = (ROOT / "docs/migrating_from_trl.md").read_text()
    (call,) = re.findall(r"^(MiniLLMConfig\(.+\))$", text, flags=re.MULTILINE)
    config = eval(call, {"MiniLLMConfig": lambda **options: MiniLLMConfig("unused", use_cpu=True, **options)})
    assert config.gamma == 0.0
    assert config.include_current_reward
