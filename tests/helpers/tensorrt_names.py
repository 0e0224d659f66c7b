"""Which names of TensorRT a source uses, and whether a TensorRT has them: ``tensorrt_names.py MODULE FOLDER``.

Follows TensorRT's objects through the ``.py`` files of a folder: from the module (``trt``, ``api.module``) along calls,
whose types the bindings tell, annotations, assignments and loops. ``if`` and ``and`` are followed as they go with this
TensorRT where ``hasattr`` decides. Prints JSON:

- ``used``: names by file, as ``IBuilderConfig.set_flag``;
- ``missing``: used without being asked for, and not there;
- ``asked``: names in ``hasattr`` and ``getattr`` with a default, and whether they are there;
- ``unclear``: names that only TensorRT's objects have, used on something that was not recognised as one.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOTS = ("trt", "module")  # variables and attributes that hold TensorRT's module


@dataclass(frozen=True)
class Value:
    """What is known of an expression."""

    kind: str  # ``module``, ``class``, ``instance``, ``call`` (gives an instance), ``many`` (of instances), ``words``
    of: Any


class Reader:
    """Reads sources against one TensorRT. Everything is read twice: what is assigned later is known the second time."""

    def __init__(self, module: Any, sources: dict[str, str]) -> None:
        self.module = module
        self.used: dict[str, set[str]] = {name: set() for name in sources}
        self.missing: set[str] = set()
        self.asked: dict[str, bool] = {}
        self.unclear: set[str] = set()
        self._attributes: dict[str, dict[str, Value]] = {name: {} for name in sources}  # by file
        classes = [item for item in vars(module).values() if isinstance(item, type)]
        own = {name for kind in classes for name in vars(kind) if "_" in name.strip("_") or name.isupper()}
        trees = {name: ast.parse(text) for name, text in sources.items()}
        theirs = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        fields = (node.target for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
        theirs |= {field.id for field in fields if isinstance(field, ast.Name)}
        self._distinct = own - theirs
        for self.final in (False, True):
            for self._file, tree in trees.items():
                self._block(tree.body, {})

    # --- what TensorRT has ------------------------------------------------------------------------

    def _has(self, value: Value, name: str) -> bool:
        return hasattr(value.of, name)

    def _member(self, value: Value, name: str) -> Value | None:
        """An attribute that is there."""
        found = getattr(value.of, name)
        if isinstance(found, type):
            return Value("class", found)
        if value.kind == "module":
            return None
        if isinstance(found, property):
            return self._returned(found.fget.__doc__, "instance")
        if type(found) is value.of:  # a member of an enumeration
            return Value("instance", value.of)
        return self._returned(found.__doc__, "call") if callable(found) else None

    def _returned(self, signature: str | None, kind: str) -> Value | None:
        """What a signature of the bindings returns, e.g. ``-> tensorrt.tensorrt.ILayer``."""
        match = re.search(r"-> (?:[\w.]+\[)?([\w.:]+)", signature or "")
        name = re.split(r"[.:]", match[1])[-1] if match else ""
        found = getattr(self.module, name, None) or getattr(self.module, name.removeprefix("I"), None)
        return Value(kind, found) if isinstance(found, type) else None

    # --- expressions ------------------------------------------------------------------------------

    def _use(self, value: Value, name: str, node: ast.AST) -> Value | None:
        label = name if value.kind == "module" else f"{value.of.__name__}.{name}"
        if self.final:
            self.used[self._file].add(label)
        if self._has(value, name):
            return self._member(value, name)
        if self.final:
            self.missing.add(f"{self._file}:{getattr(node, 'lineno', 0)}: {label}")
        return None

    def _value(self, node: ast.expr | None, names: dict[str, Value]) -> Value | None:
        if node is None:
            return None
        special: Callable[[Any, dict[str, Value]], Value | None] | None
        special = getattr(self, f"_{type(node).__name__.lower()}", None)
        if special is not None:
            return special(node, names)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child, names)
        return None

    def _name(self, node: ast.Name, names: dict[str, Value]) -> Value | None:
        return names.get(node.id) or (Value("module", self.module) if node.id in ROOTS else None)

    def _attribute(self, node: ast.Attribute, names: dict[str, Value]) -> Value | None:
        base = self._value(node.value, names)
        if base is not None and base.kind in ("module", "class", "instance"):
            return self._use(base, node.attr, node)
        if node.attr in ROOTS:
            return Value("module", self.module)
        known = [self._attributes[self._file], *self._attributes.values()]
        found = next((some[node.attr] for some in known if node.attr in some), None)
        if found is None and base is None and self.final and node.attr in self._distinct:
            self.unclear.add(f"{self._file}:{node.lineno}: {node.attr}")
        return found

    def _call(self, node: ast.Call, names: dict[str, Value]) -> Value | None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            return self._asked(node, names)
        function = self._value(node.func, names)
        for argument in (*node.args, *(item.value for item in node.keywords)):
            self._value(argument, names)
        if function is None or function.kind not in ("class", "call"):
            return None
        return Value("instance", function.of)

    def _asked(self, node: ast.Call, names: dict[str, Value]) -> Value | None:
        """``getattr`` or ``hasattr``."""
        owner, default = self._value(node.args[0], names), self._value(dict(enumerate(node.args)).get(2), names)
        words = self._words(node.args[1], names)
        if owner is None and self.final and self._distinct.intersection(words):
            self.unclear.add(f"{self._file}:{node.lineno}: {', '.join(words)}")
        if owner is None or owner.kind not in ("module", "class", "instance"):
            return default
        if not words:
            self.missing.add(f"{self._file}:{node.lineno}: a name that is computed")
        found = None
        for word in words:
            label = word if owner.kind == "module" else f"{owner.of.__name__}.{word}"
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2:
                found = self._use(owner, word, node)
            else:
                self.asked[label] = self._has(owner, word)
                found = self._member(owner, word) if self._has(owner, word) else default
        return found if isinstance(node.func, ast.Name) and node.func.id == "getattr" else None

    def _words(self, node: ast.expr, names: dict[str, Value]) -> tuple[str, ...]:
        if isinstance(node, ast.Constant):
            return (node.value,)
        known = self._value(node, names)
        return known.of if known is not None and known.kind == "words" else ()

    def _boolop(self, node: ast.BoolOp, names: dict[str, Value]) -> Value | None:
        found = None
        for part in node.values:
            found = self._value(part, names) or found
            if self._truth(part, names) is isinstance(node.op, ast.Or):  # the rest is not reached
                break
        return found

    def _ifexp(self, node: ast.IfExp, names: dict[str, Value]) -> Value | None:
        self._value(node.test, names)
        truth = self._truth(node.test, names)
        parts = [part for part, dead in ((node.body, False), (node.orelse, True)) if truth is not dead]
        return next((found for found in [self._value(part, names) for part in parts] if found), None)

    def _namedexpr(self, node: ast.NamedExpr, names: dict[str, Value]) -> Value | None:
        found = self._value(node.value, names)
        self._bind(node.target, found, names)
        return found

    def _sequence(self, node: ast.List | ast.Tuple | ast.Set, names: dict[str, Value]) -> Value | None:
        words = [item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        if words and len(words) == len(node.elts):
            return Value("words", tuple(words))
        return self._many([self._value(item, names) for item in node.elts])

    _list = _tuple = _set = _sequence

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, names: dict[str, Value]) -> Any:
        names = self._loops(node.generators, names)
        return self._many([self._value(node.elt, names)])

    _listcomp = _generatorexp = _setcomp = _comprehension

    def _dictcomp(self, node: ast.DictComp, names: dict[str, Value]) -> Value | None:
        names = self._loops(node.generators, names)
        self._value(node.key, names)
        self._value(node.value, names)
        return None

    def _loops(self, loops: Iterable[ast.comprehension], names: dict[str, Value]) -> dict[str, Value]:
        names = dict(names)
        for loop in loops:
            self._bind(loop.target, self._item(self._value(loop.iter, names)), names)
            for test in loop.ifs:
                self._value(test, names)
        return names

    def _subscript(self, node: ast.Subscript, names: dict[str, Value]) -> Value | None:
        self._value(node.slice, names)
        return self._item(self._value(node.value, names))

    def _many(self, items: list[Value | None]) -> Value | None:
        known = next((item for item in items if item is not None and item.kind == "instance"), None)
        return known and Value("many", known.of)

    def _item(self, value: Value | None) -> Value | None:
        if value is not None and value.kind == "many":
            return Value("instance", value.of)
        return value if value is not None and value.kind == "words" else None

    def _truth(self, test: ast.expr, names: dict[str, Value]) -> bool | None:
        """What ``hasattr`` decides; None if that is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            truth = self._truth(test.operand, names)
            return None if truth is None else not truth
        if isinstance(test, ast.BoolOp):
            truths = [self._truth(part, names) for part in test.values]
            decides = isinstance(test.op, ast.Or)
            return decides if decides in truths else None if None in truths else not decides
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "hasattr":
            owner, words = self._value(test.args[0], names), self._words(test.args[1], names)
            if owner is not None and owner.kind in ("module", "class", "instance") and len(words) == 1:
                return self._has(owner, words[0])
        return None

    # --- statements -------------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt], names: dict[str, Value]) -> bool:
        """Read statements; whether they surely end in ``return`` or ``raise``."""
        for function in body:
            if isinstance(function, ast.FunctionDef) and (given := self._annotated(function.returns, names)):
                names[function.name] = self._attributes[self._file][function.name] = Value("call", given.of)
        return any(self._statement(statement, names) for statement in body)

    def _statement(self, node: ast.stmt, names: dict[str, Value]) -> bool:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._definition(node, names)
        elif isinstance(node, ast.If):
            self._value(node.test, names)
            truth = self._truth(node.test, names)
            ended = self._block(node.body, names) if truth is not False else True
            return (self._block(node.orelse, names) if truth is not True else True) and ended
        elif isinstance(node, ast.For):
            self._bind(node.target, self._item(self._value(node.iter, names)), names)
            self._block([*node.body, *node.orelse], names)
        elif isinstance(node, ast.With):
            for item in node.items:
                self._bind(item.optional_vars, self._value(item.context_expr, names), names)
            return self._block(node.body, names)
        elif isinstance(node, ast.Try):
            self._block(node.body, names)
            for handler in node.handlers:
                self._block(handler.body, names)
            self._block([*node.orelse, *node.finalbody], names)
        elif isinstance(node, ast.Assign):
            found = self._value(node.value, names)
            for target in node.targets:
                self._bind(target, found, names)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for each, value in zip(target.elts, node.value.elts, strict=False):
                        self._bind(each, self._value(value, names), names)
        elif isinstance(node, ast.AnnAssign):
            self._bind(node.target, self._value(node.value, names) or self._annotated(node.annotation, names), names)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._value(child, names)
                elif isinstance(child, ast.stmt):
                    self._statement(child, names)
            return isinstance(node, ast.Return | ast.Raise)
        return False

    def _definition(self, node: ast.FunctionDef | ast.ClassDef, names: dict[str, Value]) -> None:
        inner = dict(names)
        if isinstance(node, ast.FunctionDef):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                inner.pop(argument.arg, None)
                self._bind(ast.Name(argument.arg), self._annotated(argument.annotation, names), inner)
        else:
            bases = [self._value(base, names) for base in node.bases]
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            for base in (base for base in bases if base is not None):  # TensorRT calls what a subclass overrides
                for method in (method for method in methods if not method.name.startswith("_")):
                    self._use(base, method.name, method)
        self._block(node.body, inner)

    def _annotated(self, node: ast.expr | None, names: dict[str, Value]) -> Value | None:
        """An instance by its annotation, e.g. ``trt.ITimingCache | None``."""
        if isinstance(node, ast.BinOp):
            return self._annotated(node.left, names) or self._annotated(node.right, names)
        found = self._value(node, names) if isinstance(node, ast.Attribute) else None
        return Value("instance", found.of) if found is not None and found.kind == "class" else None

    def _bind(self, target: ast.expr | None, value: Value | None, names: dict[str, Value]) -> None:
        if isinstance(target, ast.Name):
            names.pop(target.id, None)
            if value is not None:
                names[target.id] = value
        elif isinstance(target, ast.Attribute):
            self._value(target, names)  # setting it uses it, too
            if value is not None and value.kind != "words":
                self._attributes[self._file][target.attr] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for item in target.elts:
                self._bind(item, None, names)


def main() -> None:
    name, folder = sys.argv[1:]
    if name == "tensorrt-rtx":
        from cdkd_edge.engines.tensorrt.find import find_tensorrt

        module = find_tensorrt().module
    else:
        module = import_module(name)
    reader = Reader(module, {path.name: path.read_text() for path in sorted(Path(folder).glob("*.py"))})
    answer = {
        "version": module.__version__,
        "used": {name: sorted(used) for name, used in reader.used.items()},
        "missing": sorted(reader.missing),
        "asked": reader.asked,
        "unclear": sorted(reader.unclear),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
