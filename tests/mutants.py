"""The mutants of a module: its source with one small change each.

mutmut's operators, also in the functions with decorators and the tables at the top of a module,
which mutmut itself leaves alone, and five more (below). What is no behaviour is left alone:
annotations, imports, ``__all__``, docstrings, the arguments of decorators, whatever stands in a
``raise`` (which is dropped whole instead), and string literals with a space in them, which are text
for people. Of the changes of a string only the first is made, and of a call no positional argument
is dropped (it becomes None), since most such calls have too few.
"""

from collections.abc import Iterator
from typing import NamedTuple

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators


class Mutant(NamedTuple):
    """``before``, ``after``: the node that is changed, which begins in ``line``, in one line each.

    ``lines``: of the statement or the function around it, None at the top of a module: a test that
    runs none of them cannot tell it from the original.
    """

    line: int
    lines: range | None
    before: str
    after: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """All that differ from the source and from each other."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    places = wrapper.resolve(PositionProvider)
    texts = [_code(statement) for statement in wrapper.module.body]
    start = source.find(texts[0])
    found: dict[str, Mutant] = {}
    for statement, text in zip(wrapper.module.body, texts, strict=True):
        end = start + len(text)
        visitor = _Visitor(places)
        statement.visit(visitor)
        for node, lines, changed in visitor.changes:
            other = _code(statement.deep_replace(node, changed))
            whole = source[:start] + other + source[end:]
            if other != text and whole not in found:
                line = places[node].start.line
                found[whole] = Mutant(line, lines, _words(node), _words(changed), whole)
        start = end
    return list(found.values())


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def _words(node: cst.CSTNode) -> str:
    return " ".join(_code(node).split())


def _string(node: cst.BaseString) -> Iterator[cst.CSTNode]:
    if isinstance(node, cst.SimpleString) and " " not in node.value:
        yield from list(mutators.operator_string(node))[:1]


def _arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
    for i, argument in enumerate(node.args):
        if not argument.star and not m.matches(argument.value, m.Name("None")):
            none = argument.with_changes(value=cst.Name("None"))
            yield node.with_changes(args=[*node.args[:i], none, *node.args[i + 1 :]])
        if argument.star or argument.keyword:
            yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])


def _negated(node: cst.If | cst.While | cst.CompIf) -> Iterator[cst.CSTNode]:
    inner = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), inner))


def _returns_none(node: cst.Return) -> Iterator[cst.CSTNode]:
    if node.value is not None and not m.matches(node.value, m.Name("None")):
        yield cst.Return()


def _dropped(node: cst.Expr) -> Iterator[cst.CSTNode]:
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


def _passes(node: cst.Raise) -> Iterator[cst.CSTNode]:
    yield cst.Pass()


def _undecorated(node: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    if node.decorators:
        yield node.with_changes(decorators=[])


_REPLACED = {mutators.operator_string: _string, mutators.operator_arg_removal: _arguments}
_OPERATORS = [
    *((kind, _REPLACED.get(change, change)) for kind, change in mutators.mutation_operators),
    ((cst.If, cst.While, cst.CompIf), _negated),
    (cst.Return, _returns_none),
    (cst.Expr, _dropped),
    (cst.Raise, _passes),
    (cst.FunctionDef, _undecorated),
]
_ALONE = (
    m.Annotation()
    | m.Decorator()
    | m.Import()
    | m.ImportFrom()
    | m.Expr(m.SimpleString())
    | m.Assign(targets=[m.AssignTarget(target=m.Name("__all__"))])
)


class _Visitor(cst.CSTVisitor):
    def __init__(self, places: dict):
        self.changes: list[tuple[cst.CSTNode, range | None, cst.CSTNode]] = []
        self.places = places
        # the nodes that hold the present one and have lines of their own, and those lines
        self.around: list[tuple[cst.CSTNode, range | None]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _ALONE):
            return False
        lines = self.around[-1][1] if self.around else None
        if isinstance(node, cst.FunctionDef) or (self._in_function() and _has_lines(node)):
            place = self.places[node]
            # of a statement that holds others, the lines above them
            header = isinstance(node, cst.BaseCompoundStatement | cst.ExceptHandler)
            inner = header and not isinstance(node, cst.FunctionDef)
            last = self.places[node.body].start.line if inner else place.end.line
            lines = range(place.start.line, last + 1)
            self.around.append((node, lines))
        for kind, change in _OPERATORS:
            if isinstance(node, kind):
                self.changes += [(node, lines, changed) for changed in change(node)]
        return not isinstance(node, cst.Raise)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self.around and self.around[-1][0] is original_node:
            self.around.pop()

    def _in_function(self) -> bool:
        return any(isinstance(node, cst.FunctionDef) for node, _ in self.around)


def _has_lines(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement | cst.ExceptHandler)
