"""Group the operators of a graph into kernels as a compiler does, to count the bytes that are really moved.

The rules are those of TensorRT-RTX 1.7 on these graphs (``cdkd-edge inspect ENGINE --all``; the tests compare with it):
element-wise operators after a product belong to its kernel, except after an INT8 product, whose scale and bias the next
kernel applies. Successive normalisation, transposes and element-wise operators are one kernel. Reshapes, splits and
transposes that a product can read directly cost nothing. Attention is one kernel (``fused``), or its parts are kernels
that write all scores to memory (``unfused``); with ``unfused, FP32 softmax``, others cast the scores to FP32 and back,
as in mixed precision. A kernel reads its inputs from memory and writes what others need; nothing stays in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cdkd_edge.benchmark.roofline.operators import POINTWISE, PRODUCTS, VIEWS, GraphCost, Operator

FUSED, UNFUSED, UNFUSED_FP32 = "fused", "unfused", "unfused, FP32 softmax"

_PRODUCT, _ATTENTION, _LOOSE, _CLOSED = "product", "attention", "other", "closed"


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
        self._shown: dict[str, str] = {}  # by name of a view: the value that it shows
        self._working = [operator for operator in cost.operators if not self._is_free(operator)]
        self._leaving = {self._root(name) for name in cost.outputs}
        self._users: dict[str, list[Operator]] = {}  # by value: what reads it, directly or through views
        for operator in self._working:
            for name in operator.inputs:
                self._users.setdefault(self._root(name), []).append(operator)
        self.blocks = [block for operator in self._working if (block := self._block(operator))]

    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels in the order of computation."""
        member = {operator.name: number for number, block in enumerate(self.blocks) for operator in block}
        groups: list[tuple[str, list[Operator]]] = []  # kind and operators
        place: dict[str, int] = {}  # by value: the group that makes it
        opened: dict[int, int] = {}  # by block: its group, if it is one kernel
        for operator in self._working:
            block = member.get(operator.name)
            at = self._joins(operator, groups, place) if block is None else opened.get(block)
            if at is None:
                at = len(groups)
                groups.append((self._kind(operator, block), []))
                if block is not None and self._attention == FUSED:
                    opened[block] = at
            groups[at][1].append(operator)
            place.update(dict.fromkeys(operator.outputs, at))
        kernels = [self._kernel(*group, at, place) for at, group in enumerate(groups)]
        if self._attention == UNFUSED_FP32:
            softmaxes = {operator.name for block in self.blocks for operator in block if operator.op == "Softmax"}
            kernels = [part for one in kernels for part in (_widened(one) if one.operators[0] in softmaxes else (one,))]
        return tuple(kernels)

    def _kind(self, operator: Operator, block: int | None) -> str:
        if block is not None:
            return _ATTENTION if self._attention == FUSED else _CLOSED
        if operator.op not in PRODUCTS:
            return _LOOSE
        return _CLOSED if operator.precision == "int8" else _PRODUCT

    def _joins(self, operator: Operator, groups: list[tuple[str, list[Operator]]], place: dict[str, int]) -> int | None:
        """The group that an operator joins: the latest it depends on, so that groups do not depend on each other."""
        roots = {self._root(name) for name in operator.inputs}
        made = [(place[root], root) for root in roots if root in place]
        if not made or operator.op in PRODUCTS:
            return None
        at, root = max(made)
        alone = len(self._users[root]) == 1
        joins = {  # kind of group: whether only the one reader of its value may join, and which operators
            _PRODUCT: (True, POINTWISE),
            _ATTENTION: (True, POINTWISE | {"Transpose"}),
            _LOOSE: (False, POINTWISE | {"LayerNormalization", "Transpose"}),
            _CLOSED: (False, frozenset[str]()),
        }
        needs_alone, types = joins[groups[at][0]]
        return at if operator.op in types and (alone or not needs_alone) else None

    def _kernel(self, kind: str, operators: list[Operator], at: int, place: dict[str, int]) -> Kernel:
        tensors = self._cost.tensors
        names = {name for operator in operators for name in operator.inputs if name}
        outside = {name for name in names if place.get(self._root(name)) != at}
        constants = {name for name in outside if tensors[name].constant}
        inside = {operator.name for operator in operators}
        written = [
            name
            for operator in operators
            for name in operator.outputs
            if self._root(name) in self._leaving or any(user.name not in inside for user in self._users.get(name, []))
        ]
        return Kernel(
            name=operators[0].name, attention=kind == _ATTENTION,
            precision=next((operator.precision for operator in operators if operator.product_flop), "fp32"),
            operators=tuple(operator.name for operator in operators),
            product_flop=sum(operator.product_flop for operator in operators),
            vector_flop=sum(operator.vector_flop for operator in operators),
            read_bytes=sum(tensors[name].bytes for name in outside - constants),
            written_bytes=sum(tensors[name].bytes for name in written),
            constant_bytes=sum(tensors[name].bytes for name in constants),
        )  # fmt: skip

    def _is_free(self, operator: Operator) -> bool:
        """Whether an operator moves no data: constant, a view, a dequantisation, or a transpose read directly."""
        outputs = [name for name in operator.outputs if name]
        if all(self._cost.tensors[name].constant for name in outputs):
            return True
        users = [user for name in outputs for user in self._direct.get(name, [])]
        read_as_it_is = operator.swaps_last_axes and users and all(user.op in PRODUCTS for user in users)
        if operator.op not in VIEWS and operator.op != "DequantizeLinear" and not read_as_it_is:
            return False
        self._shown.update(dict.fromkeys(outputs, operator.inputs[0]))
        return True

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


def _is_inner(operator: Operator) -> bool:
    """Whether an operator may lie between the products of a fused attention; quantisation there prevents fusion."""
    return operator.op == "MatMul" or (operator.op in POINTWISE and operator.op != "QuantizeLinear")
