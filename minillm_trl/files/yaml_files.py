"""Read YAML files, with line numbers for messages."""

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

# With aliases expanded: a few lines of aliases to lists of aliases ("billion laughs") would fill the memory
_MAX_NODES = 100_000


def read_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """Return the content of a file and its root node, which is None for an empty file.

    Raises:
        ValueError: with file and line, if the file cannot be read, has tags other than YAML's own, expands to too
            many values, or repeats a key, of which YAML would silently drop one.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check_nodes(path, node)
        return yaml.safe_load(text), node
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: broken YAML: {str(error.problem)[:200]}.") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: broken YAML: character #x{error.character:04x} is not allowed.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}).") from error
    except RecursionError as error:
        raise UserError(f"{path}: its lists and mappings are nested too deeply.") from error


def line_of(node: yaml.Node, *names: str) -> int:
    """Return the line of the key at the path `names`.

    Where a key is not found, as YAML may read it as a number, that is the line of its nearest parent that is.
    """
    line = node.start_mark.line + 1
    for name in names:
        found = ((key.start_mark.line + 1, value) for key, value in node.value if key.value == name)
        line, node = next(found, (line, node))
    return line


def _check_nodes(path: Path, root: yaml.Node) -> None:
    nodes, count = [root], 0
    while nodes:
        node, count = nodes.pop(), count + 1
        if count > _MAX_NODES:
            raise UserError(f"{path}: its aliases (`*name`) expand to more than {_MAX_NODES} values. Write them out.")
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(path, node)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            _check_keys(path, node)
            nodes += [child for pair in node.value for child in pair]


def _check_scalar(path: Path, node: yaml.ScalarNode) -> None:
    place = f"{path}:{node.start_mark.line + 1}"
    try:
        node.value.encode()
        yaml.constructor.SafeConstructor().construct_object(node)
    except yaml.YAMLError:
        raise
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: {node.value[:60]!a} has half a surrogate pair. Write the whole character."
        ) from error
    except (AttributeError, IndexError, KeyError, ValueError) as error:  # PyYAML on `2024-13-45` or `!!timestamp 1`
        kind = node.tag.rpartition(":")[2]
        raise UserError(
            f"{place}: YAML reads {node.value[:60]!r} as a {kind}, which it is not. Put it in quotes."
        ) from error


def _check_keys(path: Path, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if key.value in lines:
                raise UserError(
                    f"{path}:{line}: the key {key.value[:60]!r} is already in line {lines[key.value]}. Remove one."
                )
            lines[key.value] = line
