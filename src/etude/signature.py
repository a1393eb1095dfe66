"""Constructors read from their source, not imported: what arguments they take, and whether values fit them."""

import __future__

import ast
import copy
import difflib
import functools
import importlib.machinery
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from etude.errors import Refusal


class Param(NamedTuple):
    name: str
    annotation: ast.expr | None
    required: bool
    keyword_only: bool


class Signature(NamedTuple):
    params: dict[str, Param]
    open: bool  # takes **kwargs


def signature(target: str) -> Signature:
    """The constructor arguments of dotted name `target`, read from its source. Raises Refusal if it is not there."""
    module, _, name = target.rpartition(".")
    found = _find(module, name)
    if found is None:
        names = _names(module)
        raise Refusal(f"there is no {target}{did_you_mean(name, names, prefix=module + '.')}")
    home, node = found
    if isinstance(node, ast.FunctionDef):
        return _arguments(node, skip=0)
    return _constructor(node, home)


def _source(module: str) -> Path | None:
    """The file of a dotted module, found on sys.path without importing its parents."""
    path: list[str] | None = None
    spec = None
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _tree(module: str) -> ast.Module | None:
    source = _source(module)
    return _parsed(source, source.stat().st_mtime_ns) if source else None


@functools.lru_cache(maxsize=256)
def _parsed(source: Path, changed: int) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def _find(module: str, name: str, depth: int = 0) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """-> (the module whose source defines `name`, its definition)."""
    tree = _tree(module) if depth < 4 else None
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
    for node in tree.body:  # imported from elsewhere, as torch.optim.AdamW is
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            base = (
                module
                if not node.level
                else module.rsplit(".", node.level - (_is_package(module)))[0]
                if node.level > _is_package(module)
                else module
            )
            origin = f"{base}.{node.module}" if node.level else node.module
            real = next(a.name for a in node.names if (a.asname or a.name) == name)
            return _find(origin, real, depth + 1)
    return None


def _is_package(module: str) -> int:
    source = _source(module)
    return int(source is not None and source.name == "__init__.py")


def _names(module: str) -> list[str]:
    tree = _tree(module)
    return [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))] if tree else []


def _arguments(node: ast.FunctionDef, skip: int) -> Signature:
    a = node.args
    positional = (a.posonlyargs + a.args)[skip:]
    n_plain = len(positional) - min(len(a.defaults), len(positional))
    params = [Param(p.arg, p.annotation, i < n_plain, False) for i, p in enumerate(positional)]
    params += [Param(p.arg, p.annotation, d is None, True) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return Signature({p.name: p for p in params}, a.kwarg is not None)


def _constructor(node: ast.ClassDef, module: str) -> Signature:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item, skip=1)
    params: dict[str, Param] = {}
    takes_any = False
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (found := _find(module, base.id)) and isinstance(found[1], ast.ClassDef):
            inherited = _constructor(found[1], found[0])
            params |= inherited.params
            takes_any |= inherited.open
    decorator = next((d for d in node.decorator_list if "dataclass" in ast.unparse(d)), None)
    if decorator is not None:
        kw_only = "kw_only=True" in ast.unparse(decorator)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if ast.unparse(item.annotation).startswith("ClassVar"):
                    continue
                params[item.target.id] = Param(item.target.id, item.annotation, item.value is None, kw_only)
    return Signature(params, takes_any)


def check_method(target: str) -> Callable[..., None] | None:
    """The static method `check` of a class or of one of its bases, or the function check_<name> beside a function; compiled
    from its source alone. None where there is none."""
    module, _, name = target.rpartition(".")
    found = _find(module, name)
    if found is None:
        return None
    home, node = found
    if isinstance(node, ast.FunctionDef):
        beside = _find(home, f"check_{name}")
        return _compiled(beside[1], home) if beside and isinstance(beside[1], ast.FunctionDef) else None
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "check":
            if [ast.unparse(d) for d in item.decorator_list] == ["staticmethod"]:
                return _compiled(item, home)
    bases = (check_method(f"{home}.{base.id}") for base in node.bases if isinstance(base, ast.Name))
    return next((check for check in bases if check is not None), None)


def _compiled(function: ast.FunctionDef, module: str) -> Callable[..., None]:
    function = copy.copy(function)  # the tree is kept for others
    function.decorator_list = []
    space: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), module, "exec", flags=__future__.annotations.compiler_flag), space)
    return space[function.name]


def fits(value: Any, annotation: str) -> bool:
    """Whether a plain value fits an annotation written in Python. Annotations of anything but scalars, lists, dicts and
    Literal of scalars fit everything: what a part expects of a child is the part's own business."""
    tree = ast.parse(annotation, mode="eval").body
    return fits_node(value, tree)


def fits_node(value: Any, node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return fits_node(value, node.left) or fits_node(value, node.right)
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else value == node.value
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rpartition(".")[2]
        inner = node.slice
        if name == "Literal":
            options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return any(isinstance(o, ast.Constant) and value == o.value for o in options)
        if name in ("list", "tuple"):
            first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return isinstance(value, list) and all(fits_node(v, first) for v in value)
        return isinstance(value, dict) if name in ("dict", "Callable") else True
    match ast.unparse(node).rpartition(".")[2]:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "list" | "tuple":
            return isinstance(value, list)
        case "dict":
            return isinstance(value, dict)
        case _:
            return True


def wanted(annotation: str) -> str:
    """An annotation in words."""
    return _words(ast.parse(annotation, mode="eval").body)


def _words(node: ast.expr) -> str:
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
        "dict": "a mapping",
    }
    if isinstance(node, ast.BinOp):
        left, right = _words(node.left), _words(node.right)
        return f"{left}, or {right}" if "list" in left else f"{left} or {right}"
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rpartition(".")[2]
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return "one of " + ", ".join(str(o.value) for o in inner if isinstance(o, ast.Constant))
        if name in ("list", "tuple"):
            plural = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}
            return "a list of " + " and ".join(plural.get(w, w) for w in _words(inner[0]).split(" or "))
        return "a part with a _target_" if name == "Callable" else words.get(name, name)
    text = ast.unparse(node)
    return "a part with a _target_" if text.startswith("Callable") else words.get(text, text)


def did_you_mean(word: str, options: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    if len(options) > 20:
        return "; --help lists what there is"
    return f"; there is: {', '.join(sorted(options))}" if options else ""
