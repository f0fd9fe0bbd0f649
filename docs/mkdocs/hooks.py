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
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "recipes/**/README.md", "benchmarks/**/README.md", "notebooks/README.md")
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
    folder = PurePosixPath(_in_repository(page.file.src_uri)).parent.as_posix()

    def lead(link: re.Match) -> str:
        target = normpath(f"{folder}/{link['target']}")
        if ":" in link["target"] or not (ROOT / target).exists():
            return link[0]  # another site, an e-mail address, or no link at all; what is broken, MkDocs reports
        module, anchor = target.removesuffix(".py").replace("/", "."), link["anchor"] or ""
        if target.endswith(".py") and module in described:
            uri, anchor = described[module], f"#{module}.{link['name']}" if link["name"] else f"#{module}"
        else:
            target = f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target
            uri = target.removeprefix("docs/")
            if files.get_file_from_path(uri) is None and (ROOT / target).is_file():
                _add(target, files, config)
        text = f"[`{link['name']}`]" if link["name"] else link["other"]
        return f"{text}({relpath(uri, PurePosixPath(page.file.src_uri).parent.as_posix())}{anchor})"

    parts = _FENCE.split(markdown)  # every second one is a block of code
    parts[::2] = [_LINK.sub(lead, part) for part in parts[::2]]
    return "".join(parts)


def _add(path: str, files: Files, config: MkDocsConfig) -> None:
    files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def _in_repository(src_uri: str) -> str:
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).is_file() else src_uri
