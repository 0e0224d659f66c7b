"""Group the operators of a graph into kernels as a compiler does, to count the bytes that are really moved.

The rules are those of TensorRT-RTX 1.7 on these graphs (``cdkd-edge inspect ENGINE --all``; the tests compare with it):

- Element-wise operators after a product belong to its kernel, as long as no other kernel needs their input; except
  after an INT8 product, whose scale and bias the next kernel applies.
- Products of one input with weights of one shape (queries, keys, values) are one kernel, if nothing element-wise
  follows.
- Normalisation, transposes, slices and element-wise operators are one kernel, also where branches meet, and so are
  all normalisations of one value.
- Reshapes and splits cost nothing, nor do transposes that a product can read directly: of the last two axes, and the
  split of a product without bias into heads. What is concatenated is written in place; what others read too is copied.
- Attention is one kernel (``fused``), or its parts are kernels that write all scores to memory (``unfused``); with
  ``unfused, FP32 softmax``, others cast the scores to FP32 and back, as in mixed precision. If the result of fused
  attention is quantised, one more kernel joins its heads.

A kernel reads its inputs from memory and writes what others need; nothing stays in a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter

from cdkd_edge.benchmark.roofline.operators import POINTWISE, PRODUCTS, VIEWS, GraphCost, Operator

FUSED, UNFUSED, UNFUSED_FP32 = "fused", "unfused", "unfused, FP32 softmax"

_PRODUCT, _ATTENTION, _LOOSE, _CLOSED = "product", "attention", "other", "closed"
_UNMOVED = VIEWS | {"DequantizeLinear"}
_IN_LOOSE = POINTWISE | {"LayerNormalization", "Transpose", "Concat", "Pad", "Slice"}
"""What a kernel without a product takes in. Others, such as sums over an axis, begin one."""


_Group = tuple[str, list[Operator]]  # kind and operators


@dataclass(frozen=True)
class Kernel:
    """Operators that run as one kernel."""

    name: str  # name of its first operator
    attention: bool  # whether it is a whole attention block
    precision: str  # precision of its products (``int8``, ``fp16``, ``fp32``); ``fp32`` if it has none
    operators: tuple[str, ...]
    product_flop: int
    vector_flop: int
    read_bytes: int  # activations, without weights
    written_bytes: int
    constant_bytes: int  # weights

    @property
    def traffic_bytes(self) -> int:
        """All bytes that it reads and writes."""
        return self.read_bytes + self.written_bytes + self.constant_bytes


def attention_modes(cost: GraphCost) -> tuple[str, ...]:
    """The ways in which the graph's attention can run, fastest first; ``("none",)`` without attention."""
    if not _Grouping(cost, UNFUSED).blocks:
        return ("none",)
    # TensorRT fuses attention only in FP16; the softmax of an FP32 graph is in FP32 anyway.
    return (UNFUSED,) if cost.precision == "fp32" else (FUSED, UNFUSED, UNFUSED_FP32)


def kernels_of(cost: GraphCost, attention: str) -> tuple[Kernel, ...]:
    """The kernels of a graph, with attention run in one of :func:`attention_modes`."""
    return _Grouping(cost, attention).kernels()


class _Grouping:
    """Assigns every operator that moves data to a kernel."""

    def __init__(self, cost: GraphCost, attention: str) -> None:
        self._cost, self._attention = cost, attention
        self._makers = {name: operator for operator in cost.operators for name in operator.outputs if name}
        self._direct: dict[str, list[Operator]] = {}
        for operator in cost.operators:
            for name in operator.inputs:
                self._direct.setdefault(name, []).append(operator)
        self._kinds = {operator.name: operator.op for operator in cost.operators}
        self._constants = {name for name, tensor in cost.tensors.items() if tensor.constant}
        self._shown: dict[str, str] = {}  # by name of a view: the value that it shows
        self._working = [operator for operator in cost.operators if not self._is_free(operator)]
        self._leaving = {self._root(name) for name in cost.outputs}
        self._users: dict[str, list[Operator]] = {}  # by value: what reads it, directly or through views
        for operator in self._working:
            for name in operator.inputs:
                self._users.setdefault(self._root(name), []).append(operator)
        self._groups: list[_Group] = []
        self._place: dict[str, int] = {}  # by value: the group that makes it
        self.blocks = [block for operator in self._working if (block := self._block(operator))]
        self._softmaxes = {operator.name for block in self.blocks for operator in block if operator.op == "Softmax"}

    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels in the order of computation."""
        member = {operator.name: number for number, block in enumerate(self.blocks) for operator in block}
        self._groups.clear()
        self._place.clear()
        opened: dict[int, int] = {}  # by block: its group, if it is one kernel
        for operator in self._working:
            block = member.get(operator.name)
            at = self._joins(operator) if block is None else opened.get(block)
            if at is None:
                at = len(self._groups)
                self._groups.append((self._kind(operator, block), []))
                if block is not None and self._attention == FUSED:
                    opened[block] = at
            self._groups[at][1].append(operator)
            self._place.update(dict.fromkeys(operator.outputs, at))
        self._merge()
        order = TopologicalSorter({at: self._before(at) for at in range(len(self._groups))}).static_order()
        kernels = [part for at in order if self._groups[at][1] for part in self._parts(self._kernel(at))]
        return tuple(kernel for kernel in kernels if kernel.product_flop or kernel.traffic_bytes)

    def _before(self, at: int) -> set[int]:
        """The groups that make what a group reads."""
        roots = (self._root(name) for operator in self._groups[at][1] for name in operator.inputs)
        return {self._place[root] for root in roots if root in self._place} - {at}

    def _merge(self) -> None:
        """Merge kernels without products into those that read their values, unless others come between."""
        for at, (kind, operators) in enumerate(self._groups):
            if kind != _LOOSE or any(operator.op not in _IN_LOOSE for operator in operators):
                continue
            while makers := [maker for maker in self._before(at) if self._adjoins(maker, at)]:
                earlier = self._groups[makers[0]][1]
                operators[:0] = earlier
                self._place.update({name: at for operator in earlier for name in operator.outputs})
                earlier.clear()

    def _adjoins(self, first: int, second: int) -> bool:
        """Whether a group that the second reads from has no product, and no other on a way from it to the second."""
        if self._groups[first][0] != _LOOSE:
            return False
        seen = set[int]()
        waiting = self._before(second) - {first}
        while waiting:
            seen.add(one := waiting.pop())
            waiting |= self._before(one) - seen
        return first not in seen

    def _parts(self, kernel: Kernel) -> list[Kernel]:
        """A kernel, or those that do its work: of a softmax in FP32, of attention whose result is quantised."""
        if self._attention == UNFUSED_FP32 and kernel.operators[0] in self._softmaxes:
            return _widened(kernel)
        ends = [self._kinds[name] for name in kernel.operators[-2:]]
        return _unjoined(kernel) if kernel.attention and ends == ["Transpose", "QuantizeLinear"] else [kernel]

    def _kind(self, operator: Operator, block: int | None) -> str:
        if block is not None:
            return _ATTENTION if self._attention == FUSED else _CLOSED
        if operator.op not in PRODUCTS:
            return _LOOSE
        return _CLOSED if operator.precision == "int8" else _PRODUCT

    def _joins(self, operator: Operator) -> int | None:
        """The group that an operator joins: the latest it depends on, so that groups do not depend on each other."""
        if operator.op in PRODUCTS:
            return self._sibling(operator)
        roots = {self._root(name) for name in operator.inputs}
        if operator.op == "LayerNormalization":
            for other in self._users[self._root(operator.inputs[0])]:
                if other.op == operator.op and other.outputs[0] in self._place:
                    return self._place[other.outputs[0]]
        made = [(self._place[root], root) for root in roots if root in self._place]
        if not made:
            return None
        at, root = max(made)
        alone = bool(set.intersection(*map(self._chain, self._users[root])))
        joins = {  # kind of group: whether its value's readers must be one, or meet again; and which operators may join
            _PRODUCT: (True, POINTWISE),
            _ATTENTION: (True, POINTWISE | {"Transpose"}),
            _LOOSE: (False, _IN_LOOSE),
            _CLOSED: (False, frozenset[str]()),
        }
        needs_alone, types = joins[self._groups[at][0]]
        return at if operator.op in types and (alone or not needs_alone) else None

    def _chain(self, operator: Operator) -> set[str]:
        """An operator and the element-wise ones behind it, as far as each has one reader."""
        names, users = {operator.name}, self._users.get(operator.outputs[0], [])
        while operator.op in POINTWISE and len(users) == 1 and users[0].op in POINTWISE:
            operator = users[0]
            names.add(operator.name)
            users = self._users.get(operator.outputs[0], [])
        return names

    def _sibling(self, operator: Operator) -> int | None:
        """The group of products of the same input with weights of the same shape, if nothing element-wise follows."""
        if operator.precision == "int8" or not self._is_bare(operator):
            return None
        for other in self._users[self._root(operator.inputs[0])]:
            at = self._place.get(other.outputs[0])
            alike = other.constant_bytes == operator.constant_bytes and other.precision == operator.precision
            same_input = self._root(other.inputs[0]) == self._root(operator.inputs[0])
            if at is not None and alike and same_input and self._is_bare(other):
                return at
        return None

    def _is_bare(self, operator: Operator) -> bool:
        """Whether an operator is the product of an activation and a constant that no element-wise operator follows."""
        if operator.op != "MatMul" or not operator.product_flop or operator.inputs[1] not in self._constants:
            return False
        return all(user.op not in POINTWISE for user in self._users.get(operator.outputs[0], []))

    def _kernel(self, at: int) -> Kernel:
        kind, operators = self._groups[at]
        names = {name for operator in operators for name in operator.inputs if name}
        outside = {name for name in names if self._place.get(self._root(name)) != at}
        inside = {operator.name for operator in operators}
        written_bytes = sum(self._written(name, inside) for operator in operators for name in operator.outputs)
        read_bytes = self._bytes(outside - self._constants)
        if [operator.op for operator in operators] == ["Concat"]:  # what no other reads is written in place
            copied = [name for name in outside if name in self._constants or len(self._users[self._root(name)]) > 1]
            read_bytes = written_bytes = self._bytes(copied)
        return Kernel(
            name=operators[0].name, attention=kind == _ATTENTION,
            precision=next((operator.precision for operator in operators if operator.product_flop), "fp32"),
            operators=tuple(operator.name for operator in operators),
            product_flop=sum(operator.product_flop for operator in operators),
            vector_flop=sum(operator.vector_flop for operator in operators),
            read_bytes=read_bytes, written_bytes=written_bytes, constant_bytes=self._bytes(outside & self._constants),
        )  # fmt: skip

    def _written(self, value: str, inside: set[str]) -> int:
        """Bytes of a value that leave the kernel of the operators ``inside``: all, or the parts that others read."""
        if self._root(value) in self._leaving:
            return self._bytes([value])
        readers = [user for user in self._users.get(value, []) if user.name not in inside]
        parts = {name for user in readers for name in user.inputs if self._root(name) == value}
        return min(self._bytes(parts), self._bytes([value]))

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._cost.tensors[name].bytes for name in names)

    def _is_free(self, operator: Operator) -> bool:
        """Whether an operator moves no data: constant, a view, a dequantisation, or a transpose read directly."""
        outputs = [name for name in operator.outputs if name]
        if all(self._cost.tensors[name].constant for name in outputs):
            return True
        if operator.op not in _UNMOVED and not self._is_read_as_it_is(operator):
            return False
        self._shown.update(dict.fromkeys(outputs, operator.inputs[0]))
        return True

    def _is_read_as_it_is(self, operator: Operator) -> bool:
        """Whether products read a transpose directly: of the last two axes, or of a product into heads."""
        if operator.op != "Transpose":
            return False
        readers = list(self._readers(operator.outputs[0]))
        if not readers or any(reader.op not in PRODUCTS for reader in readers):
            return False
        if operator.swaps_last_axes:
            return True
        maker = self._makers.get(self._root(operator.inputs[0]))
        by_heads = all(not self._constants & {*reader.inputs} for reader in readers)
        return by_heads and maker is not None and maker.op == "MatMul" and maker.precision != "int8"

    def _readers(self, name: str) -> Iterator[Operator]:
        """What reads a value, directly or through views."""
        for user in self._direct.get(name, []):
            if user.op in _UNMOVED or user.swaps_last_axes:
                for output in user.outputs:
                    yield from self._readers(output)
            else:
                yield user

    def _root(self, name: str) -> str:
        while name in self._shown:
            name = self._shown[name]
        return name

    def _block(self, softmax: Operator) -> list[Operator] | None:
        """The attention around a softmax: two products of activations with element-wise operators between them."""
        if softmax.op != "Softmax":
            return None
        block = [softmax]
        while block[0].op != "MatMul":
            before = [made for name in block[0].inputs if (made := self._makers.get(self._root(name)))]
            if len(before) != 1 or not _is_inner(before[0]):
                return None
            block.insert(0, before[0])
        while block[-1] is softmax or block[-1].op != "MatMul":
            after = self._users.get(self._root(block[-1].outputs[0]), [])
            if len(after) != 1 or not _is_inner(after[0]):
                return None
            block.append(after[0])
        factors = (*block[0].inputs, *block[-1].inputs)
        return None if any(self._cost.tensors[name].constant for name in factors) else block


def _widened(softmax: Kernel) -> list[Kernel]:
    """A softmax kernel between its casts to FP32 and back."""
    name, narrow, wide = softmax.name, softmax.written_bytes, 2 * softmax.written_bytes  # FP16
    return [
        replace(softmax, name=f"{name} to FP32", vector_flop=0, read_bytes=narrow, written_bytes=wide),
        replace(softmax, read_bytes=wide, written_bytes=wide),
        replace(softmax, name=f"{name} from FP32", vector_flop=0, read_bytes=wide, written_bytes=narrow),
    ]


def _unjoined(attention: Kernel) -> list[Kernel]:
    """Fused attention that writes its quantised result head by head, and a kernel that joins the heads."""
    size = attention.written_bytes
    joining = replace(
        attention, name=f"{attention.name}: heads joined", attention=False, precision="fp32", product_flop=0,
        operators=attention.operators[-2:], vector_flop=0, read_bytes=size, written_bytes=size, constant_bytes=0,
    )  # fmt: skip
    return [replace(attention, operators=attention.operators[:-2]), joining]


def _is_inner(operator: Operator) -> bool:
    """Whether an operator may lie between the products of a fused attention; quantisation there prevents fusion."""
    return operator.op == "MatMul" or (operator.op in POINTWISE and operator.op != "QuantizeLinear")
