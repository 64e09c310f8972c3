"""What the modules of projgd say about themselves, read with `ast`: nothing is imported."""

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WRITES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "remove", "clear", "register"}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package.

    Attributes:
        name: its dotted name; that of a package for an `__init__.py`.
        path: where it is.
        tree: what it says.
        known: the dotted names of all modules of the package.
    """

    name: str
    path: Path
    tree: ast.Module
    known: frozenset[str]

    def imports(self) -> Iterator[tuple[str, str | None]]:
        """Every import, those inside of functions and for type checkers too: the module, and the name taken from it."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: a relative import"
                assert node.module is not None
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield (whole, None) if whole in self.known else (node.module, alias.name)

    def needs(self) -> set[str]:
        """The modules of the package that this one imports."""
        return {module for module, _ in self.imports() if module in self.known} - {self.name}

    def packages(self) -> set[str]:
        """The packages that this module imports from."""
        return {module.partition(".")[0] for module, _ in self.imports()}

    def bound(self) -> dict[str, str]:
        """The names that imports bind here to modules of the package, or to what is taken from them."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    found[alias.asname or whole] = whole
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        return {name: whole for name, whole in found.items() if whole.partition(".")[0] == "projgd"}

    def dotted(self, node: ast.expr, bound: dict[str, str]) -> str | None:
        """The dotted name that an expression is in the package; None for anything else."""
        if isinstance(node, ast.Name):
            return bound.get(node.id)
        if isinstance(node, ast.Attribute) and (above := self.dotted(node.value, bound)) is not None:
            return f"{above}.{node.attr}"
        return None

    def private_names(self) -> Iterator[str]:
        """Private names of other modules of the package that this one uses."""
        bound = self.bound()
        for module, name in self.imports():
            if module in self.known and name is not None and is_private(name):
                yield f"{module}.{name}"
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                above = self.dotted(node.value, bound)
                if above in self.known and above != self.name:
                    yield f"{above}.{node.attr}"

    def written_at_import(self) -> Iterator[str]:
        """What this module writes into others of the package while it is imported."""
        bound = self.bound()

        def name_of(target: ast.expr) -> str | None:
            while isinstance(target, (ast.Subscript, ast.Starred)):
                target = target.value
            return self.dotted(target, bound) if isinstance(target, ast.Attribute) else None

        for node in run_at_import(self.tree):
            targets: list[ast.expr] = []
            if isinstance(node, (ast.Assign, ast.Delete)):
                targets = [part for t in node.targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
            elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
                targets = [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                targets = [ast.Attribute(node.args[0], "?")]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
                whole = self.dotted(node.func.value, bound)
                yield from [f"{whole}.{node.func.attr}(…)"] if whole else []
            yield from filter(None, map(name_of, targets))
            for target in targets:  # TABLE[…] = … where TABLE was imported
                base = target.value if isinstance(target, ast.Subscript) else None
                if isinstance(base, ast.Name) and base.id in bound:
                    yield f"{bound[base.id]}[…]"

    def functions(self) -> Iterator[tuple[str, Function]]:
        """All functions and methods with their names in the module, such as `Class.method`."""

        def within(node: ast.AST, above: str) -> Iterator[tuple[str, Function]]:
            for child in ast.iter_child_nodes(node):
                named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                name = f"{above}{child.name}." if named else above
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield name.removesuffix("."), child
                yield from within(child, name)

        return within(self.tree, "")

    @functools.cached_property
    def code(self) -> frozenset[int]:
        """The numbers of the lines of code: no docstrings, no comments, no blank lines."""
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(self.path.read_text()).readline):
            if token.type not in LAYOUT:
                lines |= set(range(token.start[0], token.end[0] + 1))
        for part in ast.walk(self.tree):
            is_constant = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
            if is_constant and isinstance(part.value.value, str):
                lines -= set(range(part.lineno, part.end_lineno + 1))
        return frozenset(lines)

    def lines_of_code(self, node: ast.stmt | None = None) -> int:
        """Lines of code in the module, or in one statement of it."""
        return sum(node is None or node.lineno <= line <= node.end_lineno for line in self.code)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that are run when the module is imported: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from run_at_import(child)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def arguments(function: Function) -> list[str]:
    """The names of a function's arguments, without `self` and `cls`."""
    a = function.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [arg.arg for i, arg in enumerate(given) if not (i == 0 and arg.arg in ("self", "cls"))]


def modules_of(root: Path = ROOT / "projgd") -> dict[str, Module]:
    """All modules of a package by their dotted names."""
    paths = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    known = frozenset(paths)
    return {name: Module(name, path, ast.parse(path.read_text()), known) for name, path in paths.items()}
