"""Reads YAML files, whose nodes know their lines."""

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

_MOST_NODES = 100_000  # what aliases stand for counted each time; nine of nine of nine ... would fill the memory


def read_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """The content of a file, and its nodes; the node of an empty one is None.

    Raises:
        ValueError: with file and line, if it cannot be read, holds tags other than YAML's own, repeats itself without
            end, or has a key twice, of which YAML would drop one.
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
    """Line of the key that the names lead to, or of the nearest above it (YAML may read a key as no text)."""
    line = node.start_mark.line + 1
    for name in names:
        found = ((key.start_mark.line + 1, value) for key, value in node.value if key.value == name)
        line, node = next(found, (line, node))
    return line


def _check_nodes(path: Path, root: yaml.Node) -> None:
    nodes, count = [root], 0
    while nodes:
        node, count = nodes.pop(), count + 1
        if count > _MOST_NODES:
            raise UserError(f"{path}: its aliases (`*name`) stand for more than {_MOST_NODES} values. Write them out.")
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(path, node)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        else:
            _check_keys(path, node)
            nodes += [each for pair in node.value for each in pair]


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
    except (AttributeError, IndexError, KeyError, ValueError) as error:  # PyYAML of `2024-13-45` or `!!timestamp 1`
        kind = node.tag.rpartition(":")[2]
        raise UserError(f"{place}: {node.value[:60]!r} is no {kind}, but read as one. Put it in quotes.") from error


def _check_keys(path: Path, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if key.value in lines:
                raise UserError(f"{path}:{line}: {key.value[:60]!r} stands in line {lines[key.value]} already.")
            lines[key.value] = line
