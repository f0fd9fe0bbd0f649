"""Hooks of MkDocs: links between pages of docs/ and files outside it work on the site as they do on GitHub.

Pages elsewhere in the repository (recipes, benchmarks, CONTRIBUTING.md, ...) become pages of the site under their own
paths. Other files that a page links to are copied beside them; a module that the reference describes is linked there.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.arithmatex import arithmatex_fenced_format
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
OUTSIDE = ("*.md", "minillm_trl/**/*.md", "recipes/**/*.md", "benchmarks/**/*.md", "notebooks/**/*.md")
FRONT_PAGE = "front_page.md"  # README.md on the site, whose own first page is docs/index.md
_FENCE = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?:\[`(?P<name>[\w.]+)(?:\(\))?`\]|(?P<other>\]))\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Settings that are Python objects: GitHub's anchors of headings, and ```math blocks."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    fence = {"name": "math", "class": "arithmatex", "format": arithmatex_fenced_format(mode="generic", tag="div")}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            _add(path.relative_to(ROOT).as_posix(), files, config)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each relative link to where its target is on the site; code is left as it is."""
    described = {
        module: file.src_uri
        for file in files.documentation_pages()
        if file.src_uri.startswith("api/")
        for module in re.findall(r"^::: ([\w.]+)$", file.content_string, flags=re.MULTILINE)
    }
    source = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    folder = PurePosixPath(page.file.src_uri).parent.as_posix()

    def lead(link: re.Match) -> str:
        target = normpath(f"{source}/{link['target']}")
        if ":" in link["target"] or not (ROOT / target).exists():
            return link[0]  # another site, an e-mail address, or no link at all; what is broken, MkDocs reports
        if (ROOT / target / "README.md").is_file():
            target += "/README.md"
        module = target.removesuffix(".py").replace("/", ".")
        uri, anchor = _site_uri(target), link["anchor"] or ""
        if target.endswith(".py") and module in described:
            uri, anchor = described[module], f"#{module}.{link['name']}" if link["name"] else f"#{module}"
        elif files.get_file_from_path(uri) is None and (ROOT / target).is_file():
            _add(target, files, config)
        text = f"[`{link['name']}`]" if link["name"] else link["other"]
        return f"{text}({relpath(uri, folder)}{anchor})"

    parts = _FENCE.split(markdown)  # every second one is a block of code
    parts[::2] = [_LINK.sub(lead, part) for part in parts[::2]]
    return "".join(parts)


def _add(path: str, files: Files, config: MkDocsConfig) -> None:
    files.append(File.generated(config, _site_uri(path), abs_src_path=str(ROOT / path)))


def _site_uri(path: str) -> str:
    return FRONT_PAGE if path == "README.md" else path.removeprefix("docs/")
