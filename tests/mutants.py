"""Mutants of a Python module: copies of its syntax tree, each with one small fault."""

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

# A path from the module to a node: names of fields, and indices in lists
Path = tuple[str | int, ...]
# What a node becomes: another one, or None where a statement is removed
Change = tuple[str, ast.AST | None]

BOUNDARIES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
NEGATIONS = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATIONS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {
    **{"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "amax": "amin", "amin": "amax"},
    **{"any": "all", "all": "any", "argmax": "argmin", "argmin": "argmax", "cumsum": "cumprod", "sum": "mean"},
    **{"nansum": "nanmean", "zeros_like": "ones_like", "ones_like": "zeros_like", "zeros": "ones"},
    **{"new_zeros": "new_ones", "new_ones": "new_zeros", "first": "last"},
}
# Methods that a mutant may skip: `x.detach()` becomes `x`
SKIPPED_METHODS = {
    *("detach", "clone", "contiguous", "masked_fill", "masked_fill_", "clamp", "clamp_", "double", "float", "long"),
    *("bool", "int", "cpu", "to", "exp", "log", "abs", "neg_", "square", "sqrt", "softmax", "mul_", "div_", "add_"),
    *("sub_", "addcmul_", "cumsum", "flip", "nan_to_num", "copy", "strip", "lower", "requires_grad_", "eval"),
}
# Decorators that change what a function computes, not how it is called
DROPPED_DECORATORS = ("no_grad", "without_cudnn_attention", "inference_mode")
# Calls whose first two arguments may be swapped
SYMMETRIC = ("transpose", "maximum", "minimum", "logaddexp")
# Keywords that only check, or act on an accelerator alone
LEFT_ALONE = ("strict", "device")
# Calls whose arguments are messages
MESSAGES = ("logger", "warnings", "logging")


@dataclass(frozen=True)
class Mutant:
    """One fault of a module.

    Attributes:
        id: module, function, operator and number; edits elsewhere in the module do not change it.
        path: of the changed node.
        replacement: the new node; None removes a statement.
        lines: a test that executes a line of this range runs the fault; the function's body for a fault in its
            signature.
        in_function: whether the loaded function can be given the changed code. Not outside the body of a function,
            which runs when the module is imported, and not where the function loses its `super()`.
        before, after: the changed code.
        function_hash: of the code around; a stored result with another hash is out of date.
    """

    id: str
    path: Path
    replacement: ast.AST | None
    lines: tuple[int, int]
    in_function: bool
    before: str
    after: str
    function_hash: str


def mutants(source: str, module: str) -> list[Mutant]:
    """Return all mutants of `source`; `module` is its name in their ids."""
    return list(_Finder(source, module).find())


def apply(source: str, mutant: Mutant) -> ast.Module:
    """Return the syntax tree of `source` with the fault."""
    tree = ast.parse(source)
    *parents, last = mutant.path
    node = tree
    for step in parents:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    replacement = copy.deepcopy(mutant.replacement)
    if replacement is None:
        replacement = ast.Pass()
    old = node[last] if isinstance(last, int) else getattr(node, last)
    for part in ast.walk(replacement):
        if isinstance(part, ast.expr | ast.stmt | ast.keyword) and not hasattr(part, "lineno"):
            ast.copy_location(part, old)
    if isinstance(last, int):
        node[last] = replacement
    else:
        setattr(node, last, replacement)
    return ast.fix_missing_locations(tree)


class _Finder:
    def __init__(self, source: str, module: str):
        self.module = module
        self.tree = ast.parse(source)
        self.numbers: Counter[tuple[str, str]] = Counter()

    def find(self) -> Iterator[Mutant]:
        yield from self._visit(self.tree, (), _Place("", (1, 10**9), "", runs_at_import=True))

    def _visit(self, node: ast.AST, path: Path, place: "_Place") -> Iterator[Mutant]:
        if _is_left_alone(node):
            return
        place = place.inside(node)
        for operator, replacement in changes(node):
            name = f"{self.module}::{place.function or '<module>'}::{operator}"
            self.numbers[name, ""] += 1
            before, after = ast.unparse(node), "" if replacement is None else ast.unparse(replacement)
            identity = f"{name}::{self.numbers[name, '']}"
            in_function = _in_function(self.tree, path) and not (replacement is None and "super()" in before)
            yield Mutant(identity, path, replacement, place.lines, in_function, before, after, place.hash)
        for step, child in _children(node):
            yield from self._visit(child, (*path, *step), place.of_child(node, step[0]))


def _in_function(tree: ast.AST, path: Path) -> bool:
    node: ast.AST | list = tree
    for step in path:
        if isinstance(node, ast.FunctionDef):
            return step == "body"
        node = node[step] if isinstance(node, list) else getattr(node, str(step))
    return False


@dataclass(frozen=True)
class _Place:
    function: str
    lines: tuple[int, int]
    hash: str
    runs_at_import: bool  # so that every test of the module depends on it

    def inside(self, node: ast.AST) -> "_Place":
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{self.function}.{node.name}".removeprefix(".")
            digest = hashlib.sha1(ast.dump(node).encode()).hexdigest()[:12] if "." not in name else self.hash
            return _Place(name, self.lines, digest, self.runs_at_import and isinstance(node, ast.ClassDef))
        if self.runs_at_import:
            return self
        if isinstance(node, ast.If | ast.While | ast.For | ast.With | ast.Try):
            last = max(node.lineno, node.body[0].lineno - 1)
            return replace(self, lines=(node.lineno, last))
        if isinstance(node, ast.stmt):
            return replace(self, lines=(node.lineno, node.end_lineno))
        return self

    def of_child(self, node: ast.AST, name: str | int) -> "_Place":
        """Signatures run when a module is imported: what shows that a test runs them is the body."""
        if isinstance(node, ast.FunctionDef) and name in ("args", "decorator_list"):
            return replace(self, lines=(node.body[0].lineno, node.end_lineno), runs_at_import=False)
        return self


def _children(node: ast.AST) -> Iterator[tuple[Path, ast.AST]]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "ctx", "ops", "op"):
            continue
        if isinstance(value, ast.AST):
            yield (name,), value
        elif isinstance(value, list):
            for index, child in enumerate(value):
                if isinstance(child, ast.AST) and not _is_docstring(node, name, index):
                    yield (name, index), child


def _is_docstring(node: ast.AST, name: str, index: int) -> bool:
    statement = getattr(node, name)[index]
    return name == "body" and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_left_alone(node: ast.AST) -> bool:
    """Return whether a node is never mutated: messages, imports, and code for type checkers."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
        return True
    if isinstance(node, ast.keyword):
        return node.arg in LEFT_ALONE
    call = node.value if isinstance(node, ast.Expr) else node
    if isinstance(call, ast.Call):
        root = call.func
        while isinstance(root, ast.Attribute):
            root = root.value
        return isinstance(root, ast.Name) and root.id in MESSAGES
    return False


def changes(node: ast.AST) -> Iterator[Change]:
    """Yield every replacement of a node, with the name of its operator."""
    kinds = {
        ast.Compare: _of_comparison,
        ast.BinOp: _of_operation,
        ast.AugAssign: _of_augmented,
        ast.BoolOp: _of_boolean,
        ast.UnaryOp: _of_unary,
        ast.IfExp: _of_choice,
        ast.If: _of_condition,
        ast.Constant: _of_constant,
        ast.Call: _of_call,
        ast.Dict: _of_dict,
        ast.Return: _of_return,
        ast.Expr: _of_statement,
        ast.Assign: _of_assignment,
        ast.With: _of_context,
        ast.FunctionDef: _of_function,
        ast.Continue: lambda node: [("continue to break", ast.Break())],
        ast.Break: lambda node: [("break to continue", ast.Continue())],
    }
    if type(node) in kinds:
        yield from kinds[type(node)](node)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _without(values: list, index: int) -> list:
    return values[:index] + values[index + 1 :]


def _of_comparison(node: ast.Compare) -> Iterator[Change]:
    for index, operation in enumerate(node.ops):
        for name, table in (("boundary", BOUNDARIES), ("negated comparison", NEGATIONS)):
            if type(operation) in table:
                ops = [*node.ops[:index], table[type(operation)](), *node.ops[index + 1 :]]
                yield name, _with(node, ops=ops)


def _of_operation(node: ast.BinOp) -> Iterator[Change]:
    if type(node.op) in OPERATIONS:
        yield "operation", _with(node, op=OPERATIONS[type(node.op)]())


def _of_augmented(node: ast.AugAssign) -> Iterator[Change]:
    if type(node.op) in OPERATIONS:
        yield "operation", _with(node, op=OPERATIONS[type(node.op)]())
    yield "removed statement", None


def _of_boolean(node: ast.BoolOp) -> Iterator[Change]:
    yield "and/or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for index in range(len(node.values)):
        rest = _without(node.values, index)
        yield "removed condition", rest[0] if len(rest) == 1 else _with(node, values=rest)


def _of_unary(node: ast.UnaryOp) -> Iterator[Change]:
    if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "removed sign or negation", node.operand


def _of_choice(node: ast.IfExp) -> Iterator[Change]:
    yield "swapped branches", _with(node, body=node.orelse, orelse=node.body)


def _of_condition(node: ast.If) -> Iterator[Change]:
    only_raises = not node.orelse and isinstance(node.body[-1], ast.Raise)
    if not only_raises:  # where a test expects the error, the comparison inside is changed
        yield "condition always true", _with(node, test=ast.Constant(True))
    yield "condition always false", _with(node, test=ast.Constant(False))


def _of_constant(node: ast.Constant) -> Iterator[Change]:
    if isinstance(node.value, bool):
        yield "boolean", ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield "constant + 1", ast.Constant(node.value + 1)
        if node.value != 0:
            yield "constant - 1", ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield "constant", ast.Constant(2.0 * node.value if node.value else 1.0)


def _of_call(node: ast.Call) -> Iterator[Change]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in LEFT_ALONE:
            yield "dropped keyword", _with(node, keywords=_without(node.keywords, index))
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    for index in range(0 if name not in SYMMETRIC else 2, len(node.args) - 1):
        pair = node.args[index : index + 2]
        if not any(isinstance(argument, ast.Starred) for argument in pair) and ast.dump(pair[0]) != ast.dump(pair[1]):
            args = [*node.args[:index], pair[1], pair[0], *node.args[index + 2 :]]
            yield "swapped arguments", _with(node, args=args)
    if isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield "function", _with(node, func=ast.Name(NAMES[node.func.id], ast.Load()))
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in NAMES:
            yield "function", _with(node, func=_with(node.func, attr=NAMES[node.func.attr]))
        if node.func.attr in SKIPPED_METHODS and not _is_module(node.func.value) and not _is_move(node):
            yield "skipped method", node.func.value
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in ("min", "max"):
            other = _with(keyword, arg="max" if keyword.arg == "min" else "min")
            yield "function", _with(node, keywords=[*node.keywords[:index], other, *node.keywords[index + 1 :]])


def _is_move(node: ast.Call) -> bool:
    """Return whether a call moves a tensor to another device, which changes nothing on a CPU."""
    method = ast.unparse(node.func).rpartition(".")[2]
    return method == "cpu" or (method == "to" and all(ast.unparse(each).endswith("device") for each in node.args))


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "np", "math", "copy")


def _of_dict(node: ast.Dict) -> Iterator[Change]:
    for index, key in enumerate(node.keys):
        if key is not None:
            yield "dropped entry", _with(node, keys=_without(node.keys, index), values=_without(node.values, index))


def _of_return(node: ast.Return) -> Iterator[Change]:
    if isinstance(node.value, ast.BinOp):
        yield "returned operand", _with(node, value=node.value.left)
        yield "returned operand", _with(node, value=node.value.right)
    elif isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
        yield "swapped results", _with(node, value=_with(node.value, elts=node.value.elts[::-1]))


def _of_statement(node: ast.Expr) -> Iterator[Change]:
    if isinstance(node.value, ast.Call):
        yield "removed statement", None


def _of_assignment(node: ast.Assign) -> Iterator[Change]:
    """Where the name had a value before, or is one of an object's; new names would fail wherever they are read."""
    (target,) = node.targets if len(node.targets) == 1 else (None,)
    names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
    again = isinstance(target, ast.Name) and target.id in names
    if again or isinstance(target, ast.Attribute | ast.Subscript):
        yield "removed statement", None
    elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == 2:
        yield "swapped results", _with(node, value=_with(node.value, elts=node.value.elts[::-1]))


def _of_context(node: ast.With) -> Iterator[Change]:
    for index, item in enumerate(node.items):
        if item.optional_vars is None:
            rest = _without(node.items, index)
            yield "dropped context", _with(node, items=rest) if rest else ast.If(ast.Constant(True), node.body, [])


def _of_function(node: ast.FunctionDef) -> Iterator[Change]:
    for index, decorator in enumerate(node.decorator_list):
        if any(name in ast.unparse(decorator) for name in DROPPED_DECORATORS):
            yield "dropped decorator", _with(node, decorator_list=_without(node.decorator_list, index))
