"""Every change of one place of a module's syntax tree that could make it compute something else.

What no computation sees is left alone: docstrings, annotations, decorators, imports, protocols, the words of an error.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import marshal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

Named = tuple[str, ast.AST]
"""An operator's name, and the node that it puts in the place of the one it was given."""

_ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_COMPARISONS: Mapping[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_COUNTERPARTS: Mapping[str, str] = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "sum": "mean", "mean": "sum", "all": "any",
    "any": "all", "argmax": "argmin", "zeros": "ones", "zeros_like": "ones_like", "ones": "zeros",
    "ones_like": "zeros_like", "sin": "cos", "cos": "sin", "exp": "expm1", "log": "log1p", "rint": "floor",
}  # fmt: skip
_TRANSPOSITIONS = frozenset({"transpose", "swapaxes", "T"})
_COPIES = frozenset({"array", "copy", "dict"})
_CASTS = frozenset({"float", "int", "bool", "str", "tuple", "list", "frozenset", "asarray", "ascontiguousarray"})
"""Nearly everywhere NumPy, or the reader of the value, makes the same of it without them: not a slip that shows."""
_COMMUTATIVE = frozenset({"min", "max", "minimum", "maximum"})
_WIDEST = "np.float64"
"""What NumPy widens to by itself as soon as one operand is so wide."""
_NOT_COMPUTED = (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)
_KEYWORDS_OF_VALUES = frozenset({"axis", "keepdims", "initial", "dtype"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node hangs in its tree.

    `statement` is the line of the innermost statement around it, `within` the function or class, "" for the module.
    `at_import` is whether it runs when the module is imported.
    """

    parent: ast.AST
    field: str
    index: int | None
    statement: int
    within: str
    at_import: bool

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One operator at one place of one tree."""

    line: int
    column: int
    operator: str
    place: Place
    replacement: ast.AST

    @property
    def where(self) -> tuple[int, int, str]:
        """What tells it from every other change of its module."""
        return self.line, self.column, self.operator

    def apply(self) -> None:
        """Change the tree that this was found in."""
        self.place.put(self.replacement)
        ast.fix_missing_locations(self.place.parent)


def changes_of(tree: ast.Module) -> Iterator[Change]:
    """All changes, from the top of the module to its end."""
    for node, place in _computed(tree, Place(tree, "body", None, 1, "", True)):
        for operator_of in _OPERATORS:
            for name, replacement in operator_of(node):
                if not hasattr(replacement, "lineno"):  # a part of the tree keeps its own place
                    ast.copy_location(replacement, node)
                yield Change(*_position(node), name, _where_it_differs(node, name, place), replacement)


def _where_it_differs(node: ast.AST, operator: str, place: Place) -> Place:
    """A branch that is never taken makes a difference where its first statement would have run."""
    if isinstance(node, ast.If | ast.While) and operator == "never":
        return replace(place, statement=node.body[0].lineno)
    return place


def statements_of(tree: ast.Module) -> frozenset[int]:
    """Lines of the statements in functions: those that a run may or may not reach."""
    return frozenset(
        statement.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for statement in ast.walk(function)
        if isinstance(statement, ast.stmt) and statement is not function and not _is_apart(statement, function)
    )


def changed(source: str, where: tuple[int, int, str]) -> ast.Module:
    """The tree of a module with one change. Raises LookupError for a place or operator that it has not."""
    tree = ast.parse(source)
    change = next((change for change in changes_of(tree) if change.where == where), None)
    if change is None:
        raise LookupError(f"no change {where}")
    change.apply()
    return tree


def makes_equal_code(source: str, where: tuple[int, int, str]) -> bool:
    """Whether the compiler makes the same of both: such a change is none."""
    return _code(changed(source, where)) == _code(ast.parse(source))


def is_written_alike(source: str, where: tuple[int, int, str]) -> bool:
    """Whether both are the same text, as where two equal arguments change places."""
    return ast.unparse(changed(source, where)) == ast.unparse(ast.parse(source))


def told(source: str, where: tuple[int, int, str]) -> tuple[str, str]:
    """(what stood there, what stands there now), as code."""
    before, after = (ast.unparse(tree).splitlines() for tree in (ast.parse(source), changed(source, where)))
    _, _, *lines = difflib.unified_diff(before, after, n=0, lineterm="")
    was, becomes = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return was, becomes


def _code(tree: ast.Module) -> bytes:
    return marshal.dumps(compile(tree, "module", "exec"))


# what is computed -----------------------------------------------------------------------------------------------------
def _computed(node: ast.AST, around: Place) -> Iterator[tuple[ast.expr | ast.stmt, Place]]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "msg", "pattern"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_apart(child, node):
                continue
            line = child.lineno if isinstance(child, ast.stmt) else around.statement
            place = Place(node, field, index, line, around.within, around.at_import)
            if isinstance(child, ast.expr | ast.stmt):
                yield child, place
            if not isinstance(child, _NOT_COMPUTED):
                yield from _computed(child, _inside(child, place))


def _inside(node: ast.AST, place: Place) -> Place:
    """The place of what a node is made of."""
    match node:
        case ast.FunctionDef(name=name):
            return replace(place, within=f"{place.within}.{name}".lstrip("."), at_import=False)
        case ast.ClassDef(name=name):
            return replace(place, within=f"{place.within}.{name}".lstrip("."))
        case _:
            return place


def _is_apart(node: ast.AST, parent: ast.AST) -> bool:
    """A docstring, a protocol, or an alias of types."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.ClassDef(bases=[ast.Name(id="Protocol")]):
            return True
        case ast.Assign(value=value) if isinstance(parent, ast.Module):
            return not any(_is_value(inner) for inner in ast.walk(value))
        case _:
            return False


def _is_value(node: ast.AST) -> bool:
    return isinstance(node, ast.Call | ast.Lambda) or (isinstance(node, ast.Constant) and node.value is not None)


def _position(node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Where the operator itself stands: several expressions may begin at one character."""
    match node:
        case ast.BinOp(left=before) | ast.Compare(left=before) | ast.Call(func=before) | ast.Attribute(value=before):
            return before.end_lineno or before.lineno, before.end_col_offset or before.col_offset
        case ast.Subscript(value=before) | ast.BoolOp(values=[before, *_]):
            return before.end_lineno or before.lineno, before.end_col_offset or before.col_offset
        case ast.IfExp(body=before):
            return before.end_lineno or before.lineno, before.end_col_offset or before.col_offset
        case _:
            return node.lineno, node.col_offset


# operators: from a node to what may stand in its place ----------------------------------------------------------------
def _arithmetic(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
            other = _ARITHMETIC[type(operator)]
            yield f"{_word(operator)}_to_{_word(other())}", ast.BinOp(left, other(), right)
            if not isinstance(operator, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr | ast.BitXor):
                yield "operands_swapped", ast.BinOp(right, operator, left)
            yield "left_operand_alone", left
            yield "right_operand_alone", right
        case ast.BinOp(left, ast.MatMult(), right):
            yield "operands_swapped", ast.BinOp(right, ast.MatMult(), left)
        case ast.AugAssign(target, operator, value) if type(operator) in _ARITHMETIC:
            other = _ARITHMETIC[type(operator)]
            yield f"{_word(operator)}_to_{_word(other())}", ast.AugAssign(target, other(), value)
        case ast.UnaryOp(ast.USub() | ast.Invert(), ast.expr() as operand) if not isinstance(operand, ast.Constant):
            yield "sign_dropped", operand


def _comparisons(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.Compare(left, [operator], comparators):
            for other in _COMPARISONS[type(operator)]:
                yield f"{_word(operator)}_to_{_word(other())}", ast.Compare(left, [other()], comparators)
        case ast.BoolOp(operator, values):
            joined = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield f"{_word(operator)}_to_{_word(joined)}", ast.BoolOp(joined, values)
            yield "first_condition_alone", values[0]
            yield "last_condition_alone", values[-1]
        case ast.UnaryOp(ast.Not(), operand):
            yield "not_dropped", operand


def _constants(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.Constant(bool() as value):
            yield "flipped", ast.Constant(not value)
        case ast.Constant(int() as value):
            yield "plus_one", ast.Constant(value + 1)
            yield "minus_one", ast.Constant(value - 1)
        case ast.Constant(float() as value):
            yield "doubled", ast.Constant(2.0 * value if value else 1.0)
            if 0.0 < abs(value) < 1e-3:
                yield "hundredfold", ast.Constant(100.0 * value)


def _calls(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.Call(function, arguments, keywords):
            name = _name_of(function)
            if name in _COUNTERPARTS and (
                isinstance(function, ast.Attribute) or hasattr(builtins, _COUNTERPARTS[name])
            ):
                yield f"{name}_to_{_COUNTERPARTS[name]}", ast.Call(_renamed(function), arguments, keywords)
            if len(arguments) > 1 and name not in _COMMUTATIVE and ast.dump(arguments[0]) != ast.dump(arguments[1]):
                swapped = [arguments[1], arguments[0], *arguments[2:]]
                yield "arguments_swapped", ast.Call(function, swapped, keywords)
            yield from _call_left_out(function, arguments, name)
            for keyword in keywords:
                if keyword.arg in _KEYWORDS_OF_VALUES and ast.unparse(keyword.value) != _WIDEST:
                    others = [other for other in keywords if other is not keyword]
                    yield f"{keyword.arg}_left_out", ast.Call(function, arguments, others)
        case ast.Attribute(value, "T"):
            yield "transposition_dropped", value


def _call_left_out(function: ast.expr, arguments: list[ast.expr], name: str) -> Iterator[Named]:
    """What the call was given, or the array whose method it is, in its place."""
    is_method = isinstance(function, ast.Attribute) and _name_of(function.value) not in ("np", "math", "self")
    left = function.value if isinstance(function, ast.Attribute) and (is_method and not arguments) else None
    left = left or (arguments[0] if arguments else None)
    if name in _TRANSPOSITIONS and isinstance(function, ast.Attribute):
        yield "transposition_dropped", function.value if name == "transpose" else arguments[0]
    elif name == "astype" and isinstance(function, ast.Attribute):
        if ast.unparse(arguments[0]) != _WIDEST:
            yield "conversion_dropped", function.value
    elif name not in _CASTS and left is not None and not isinstance(left, ast.Starred):
        yield "copy_dropped" if name in _COPIES else "call_dropped", left


def _slices(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.Slice(lower, upper, step):
            if lower is not None:
                yield "start_left_out", ast.Slice(None, upper, step)
            if upper is not None:
                yield "end_left_out", ast.Slice(lower, None, step)
            if step is not None:
                yield "step_left_out", ast.Slice(lower, upper, None)
        case ast.Subscript(value, ast.Slice(), ast.Load()):
            yield "slice_dropped", value


def _branches(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.If(test, body, orelse):
            yield "negated", ast.If(_negated(test), body, orelse)
            yield "always", ast.If(ast.Constant(True), body, orelse)
            yield "never", ast.If(ast.Constant(False), body, orelse)
        case ast.IfExp(test, body, orelse):
            yield "negated", ast.IfExp(_negated(test), body, orelse)
            yield "always", body
            yield "never", orelse
        case ast.While(test, body, orelse):
            yield "never", ast.While(ast.Constant(False), body, orelse)


def _loops(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.For(target, iterable, body, orelse):
            yield "last_left_out", ast.For(target, _without_last(iterable), body, orelse)
            yield "first_left_out", ast.For(target, _without_first(iterable), body, orelse)
        case ast.ListComp(element, [first, *others]):
            for name, loop in _other_loops(first):
                yield name, ast.ListComp(element, [loop, *others])
        case ast.GeneratorExp(element, [first, *others]):
            for name, loop in _other_loops(first):
                yield name, ast.GeneratorExp(element, [loop, *others])
        case ast.SetComp(element, [first, *others]):
            for name, loop in _other_loops(first):
                yield name, ast.SetComp(element, [loop, *others])
        case ast.DictComp(key, value, [first, *others]):
            for name, loop in _other_loops(first):
                yield name, ast.DictComp(key, value, [loop, *others])


def _statements(node: ast.AST) -> Iterator[Named]:
    match node:
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise():
            yield "statement_dropped", ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()], _):
            yield "statement_dropped", ast.Pass()
        case ast.Continue():
            yield "continue_to_break", ast.Break()
        case ast.Break():
            yield "break_to_continue", ast.Continue()
        case ast.Tuple([first, second, *others], ast.Load() as context):
            yield "first_two_swapped", ast.Tuple([second, first, *others], context)


_OPERATORS: tuple[Callable[[ast.AST], Iterator[Named]], ...] = (
    _arithmetic,
    _comparisons,
    _constants,
    _calls,
    _slices,
    _branches,
    _loops,
    _statements,
)


def _word(operator: ast.AST) -> str:
    return type(operator).__name__.lower()


def _name_of(node: ast.expr) -> str:
    match node:
        case ast.Name(name) | ast.Attribute(_, name):
            return name
        case _:
            return ""


def _renamed(function: ast.expr) -> ast.expr:
    match function:
        case ast.Attribute(value, name, context):
            return ast.Attribute(value, _COUNTERPARTS[name], context)
        case ast.Name(name, context):
            return ast.Name(_COUNTERPARTS[name], context)
        case _:
            raise AssertionError("a name or an attribute has a counterpart")


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _without_last(iterable: ast.expr) -> ast.expr:
    return _part(iterable, ast.Slice(None, ast.UnaryOp(ast.USub(), ast.Constant(1)), None))


def _without_first(iterable: ast.expr) -> ast.expr:
    return _part(iterable, ast.Slice(ast.Constant(1), None, None))


def _part(iterable: ast.expr, bounds: ast.Slice) -> ast.expr:
    listed = ast.Call(ast.Name("list", ast.Load()), [iterable], [])
    return ast.Subscript(listed, bounds, ast.Load())


def _other_loops(loop: ast.comprehension) -> Iterator[tuple[str, ast.comprehension]]:
    yield "last_left_out", ast.comprehension(loop.target, _without_last(loop.iter), loop.ifs, loop.is_async)
    if loop.ifs:
        yield "unfiltered", ast.comprehension(loop.target, loop.iter, [], loop.is_async)
