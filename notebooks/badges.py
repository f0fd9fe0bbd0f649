"""Put badges into the notebooks, which open them on Colab and Kaggle from a public repository.

    python notebooks/badges.py https://github.com/OWNER/REPOSITORY [--branch main]

Both services read notebooks from GitHub. The badges are the first line of each notebook. A second
run replaces them.
"""

import argparse
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
COLAB = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
KAGGLE = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"


def badges(repository: str, branch: str, notebook: str) -> str:
    """Return the badges of a notebook.

    Raises:
        ValueError: if the address is not that of a repository on GitHub.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", repository)
    if found is None:
        raise ValueError(f"{repository!r} is no address like https://github.com/OWNER/REPOSITORY.")
    path = f"{found[1]}/blob/{branch}/notebooks/{notebook}"
    colab = f"(https://colab.research.google.com/github/{path})"
    return (
        f"{COLAB}{colab} {KAGGLE}(https://kaggle.com/kernels/welcome?src=https://github.com/{path})"
    )


def add_badges(notebook: Path, repository: str, branch: str) -> None:
    """Write the badges into a notebook, in place of earlier ones."""
    content = json.loads(notebook.read_text())
    source = content["cells"][0]["source"]
    while source and (source[0].startswith(COLAB) or (source[0] == "\n" and len(source) > 1)):
        source.pop(0)
    source[:0] = [badges(repository, branch, notebook.name) + "\n", "\n"]
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", help="address of the repository on GitHub")
    parser.add_argument("--branch", default="main")
    arguments = parser.parse_args()
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        try:
            add_badges(notebook, arguments.repository, arguments.branch)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
