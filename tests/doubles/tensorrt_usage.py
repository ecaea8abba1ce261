"""What our code uses of TensorRT's API, read off its source.

A small type inference follows TensorRT's objects from the parameters where they come in (`SEEDS`) through assignments,
calls and attributes, with the types that `tensorrt_surface` gives.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tensorrt_surface import MODULE, SEEDS, result_of

RUNTIME = Path(__file__).resolve().parents[2] / "runtime" / "trt"
Scope = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a member.

    Attributes:
        where: File and line.
        owner: The class; `MODULE` for the module itself.
        member: Its name; "__init__" where an object is made.
        kind: "read", "write", "call", or "override" where a class of ours has a method of that name.
        arguments: How many go in by place, or None where that is not known.
        keywords: Those that go in by name; for an override, its parameters.
    """

    where: str
    owner: str
    member: str
    kind: str
    arguments: int | None = 0
    keywords: tuple[str, ...] = ()


@dataclass
class Usage:
    """All uses, and what was not understood: attributes of unknown objects, with their place."""

    uses: list[Use] = field(default_factory=list)
    loose: list[tuple[str, str]] = field(default_factory=list)


@functools.cache
def usage(files: tuple[str, ...] = ()) -> Usage:
    """Uses in files of `runtime/`; in all of them unless some are named."""
    found = Usage()
    for path in sorted(RUNTIME.rglob("*.py")):
        if not files or path.name in files:
            read(path.read_text(), path.name, found)
    return found


def read(source: str, file: str, found: Usage) -> Usage:
    """Add the uses in a file's source."""
    _Walker(file, found).visit(ast.parse(source))
    return found


class _Walker(ast.NodeVisitor):
    def __init__(self, file: str, found: Usage) -> None:
        self._file, self._found = file, found
        self._seeds = SEEDS.get(file, {})
        self._scopes: list[Scope] = [dict(self._seeds.get("*", {}))]
        self._seen: set[int] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scopes.append(dict(self._seeds.get(node.name, {})))
        self.generic_visit(node)
        self._scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self._type(base) for base in node.bases]
        for owner in (base.removeprefix("type:") for base in bases if base and base.startswith("type:")):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    names = tuple(argument.arg for argument in method.args.args[1:])
                    self._use(method, owner, method.name, "override", keywords=names)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        kind = self._type(node.value)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):  # no object of interest is starred
                    self._bind(part, self._type(value))
            else:
                self._bind(target, kind)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, self._type(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._element(node.iter))
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._comprehension(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._type(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._type(node)
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self._scopes.append({})
        for clause in node.generators:
            self._bind(clause.target, self._element(clause.iter))
        self.generic_visit(node)
        self._scopes.pop()

    def _bind(self, target: ast.expr, kind: str | None) -> None:
        if isinstance(target, ast.Name) and kind:
            self._scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute) and target.attr == "__class__" and isinstance(target.value, ast.Name):
            self._scopes[-1][target.value.id] = (kind or "").removeprefix("type:")
            self._seen.add(id(target))
        elif isinstance(target, ast.Attribute):
            owner = self._type(target.value)
            self._seen.add(id(target))
            if owner:
                self._use(target, owner, target.attr, "write")
            else:
                self._found.loose.append((f"{self._file}:{target.lineno}", target.attr))

    def _element(self, node: ast.expr) -> str | None:
        kind = self._type(node) or ""
        return kind.removeprefix("list[").removesuffix("]") if kind.startswith("list[") else None

    def _type(self, node: ast.expr) -> str | None:
        """What an expression is: a class, "type:" and a class for the class itself, or None."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self._scopes) if node.id in scope), None)
        if isinstance(node, ast.IfExp):
            return self._type(node.body) or self._type(node.orelse)
        if isinstance(node, ast.ListComp):
            self._scopes.append({})
            for clause in node.generators:
                self._bind(clause.target, self._element(clause.iter))
            kind = self._type(node.elt)
            self._scopes.pop()
            return f"list[{kind}]" if kind else None
        if isinstance(node, ast.Attribute):
            return self._attribute(node, "read")
        if isinstance(node, ast.Call):
            return self._call(node)
        return None

    def _attribute(self, node: ast.Attribute, kind: str) -> str | None:
        owner = self._type(node.value)
        if owner is None or owner.startswith("list["):
            named = self._scopes[0].get(node.attr.removeprefix("_"))
            if named is None and id(node) not in self._seen:
                self._seen.add(id(node))
                self._found.loose.append((f"{self._file}:{node.lineno}", node.attr))
            return named
        if kind == "read":
            self._use(node, owner.removeprefix("type:"), node.attr, kind)
        if owner == MODULE:
            return f"type:{node.attr}"
        return result_of(owner.removeprefix("type:"), node.attr)

    def _call(self, node: ast.Call) -> str | None:
        indices = None if any(isinstance(argument, ast.Starred) for argument in node.args) else len(node.args)
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = self._type(function.value)
            if owner and owner != MODULE and not owner.startswith(("type:", "list[")):
                self._seen.add(id(function))
                self._use(node, owner, function.attr, "call", arguments=indices, keywords=keywords)
                return result_of(owner, function.attr)
        made = self._type(function) or ""
        if made.startswith("type:"):
            self._use(node, made.removeprefix("type:"), "__init__", "call", arguments=indices, keywords=keywords)
            return made.removeprefix("type:")
        return None

    def _use(
        self,
        node: ast.AST,
        owner: str,
        member: str,
        kind: str,
        *,
        arguments: int | None = 0,
        keywords: tuple[str, ...] = (),
    ) -> None:
        key = id(node) if kind != "call" else -id(node)
        if key in self._seen and kind in ("read", "call", "override"):
            return
        self._seen.add(key)
        where = f"{self._file}:{getattr(node, 'lineno', 0)}"
        self._found.uses.append(
            Use(where=where, owner=owner, member=member, kind=kind, arguments=arguments, keywords=keywords)
        )


def members(found: Usage) -> Iterator[tuple[str, str]]:
    """Class and member of each use, once each."""
    yield from dict.fromkeys((use.owner, use.member) for use in found.uses)
