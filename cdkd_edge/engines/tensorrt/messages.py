"""What TensorRT's ONNX parser documents about operators, for answers to its errors.

From its changelog and its operator table (https://github.com/onnx/onnx-tensorrt, ``docs/Changelog.md`` of 8.5 to 10.15,
``docs/operators.md`` of 8.5, 9.2, 10.0 and 10.15). What they do not say is said to be not known.

What TensorRT says while it fails, for the message of the error: its functions return no reasons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

LogTo = Callable[[Callable[[str, str], None]], AbstractContextManager[None]]
"""As ``log_to`` of the TensorRT module's finder: while it is entered, log lines go to the sink."""


class Listener:
    """Remembers the last errors that TensorRT logged while it was entered; usable again and again."""

    def __init__(self, log_to: LogTo | None) -> None:
        self._log_to = log_to
        self._errors: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Listener:
        self._errors.clear()
        if self._log_to is not None:
            self._stack.enter_context(self._log_to(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _hear(self, severity: str, text: str) -> None:
        if severity == "error":
            del self._errors[:-1]
            self._errors.append(" ".join(text.split())[:300])

    def said(self) -> str:
        """``: what it said``, for the end of a message; empty if nothing."""
        return f": {'; '.join(self._errors)}" if self._errors else ""


SINCE: Mapping[str, str] = {
    "Attention": "10.14",
    "BlackmanWindow": "10.4",
    "DeformConv": "10.1",
    "GridSample": "8.5",
    "GroupNormalization": "8.6",
    "HammingWindow": "10.4",
    "HannWindow": "10.4",
    "Hardmax": "9.2",
    "IsInf": "8.6",
    "LayerNormalization": "8.6",
    "MeanVarianceNormalization": "8.5",
    "Mod": "8.5",
    "NonZero": "8.5",
    "RMSNormalization": "10.15",
    "RandomNormal": "8.5",
    "RoiAlign": "8.5",
    "RotaryEmbedding": "10.15",
    "STFT": "10.5",
    "TensorScatter": "10.15",
    "Trilu": "8.5",
}
"""Release in whose changelog support for an operator appears."""

UNSUPPORTED = frozenset((
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
    "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det", "DynamicQuantizeLinear", "ImageDecoder",
    "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
    "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SequenceMap", "SoftmaxCrossEntropyLoss",
))  # fmt: skip
"""Operators that the table of 10.15 lists as not supported."""

OPSETS: Mapping[str, int] = {"8.5": 17, "9.2": 19, "10.0": 20, "10.15": 24}
"""Highest opset that the table of a release names."""


@dataclass(frozen=True)
class ParserComplaint:
    """One error of the parser."""

    node: str
    """Name of the node; empty if it has none."""
    operator: str
    """Empty if the error is not about a node."""
    domain: str
    opset: int
    """Opset of ONNX's own domain that the graph uses."""
    text: str
    """In the parser's words."""


def explain(complaint: ParserComplaint, tensorrt: str) -> tuple[str, str]:
    """What a user reads, and what to do.

    Args:
        complaint: the parser's first error.
        tensorrt: name and version of the TensorRT, for the message.
    """
    said = " ".join(complaint.text.split())[:240]
    if not complaint.operator:
        return f"{tensorrt} cannot read the graph: {said}", "export it again"
    node = f"node {complaint.node!r}" if complaint.node else "a node without a name"
    message = f"{tensorrt} does not take {node}, an ONNX {complaint.operator}"
    if complaint.domain not in ("", "ai.onnx"):
        message = f"{tensorrt} does not take {node}, a {complaint.domain}.{complaint.operator}"
        hint = "this is an operator of ONNX Runtime and the file perhaps a CPU engine: build from the graph in export/"
        return f"{message}: {said}", hint
    return f"{message} ({_since(complaint.operator)}): {said}", _advice(complaint)


def _since(operator: str) -> str:
    if operator in SINCE:
        return f"in TensorRT's parser since {SINCE[operator]}"
    if operator in UNSUPPORTED:
        return "not in TensorRT's parser as of 10.15"
    return "since when TensorRT's parser has it is not known here"


def _advice(complaint: ParserComplaint) -> str:
    if complaint.operator in ("DequantizeLinear", "QuantizeLinear"):
        return (
            "TensorRT takes Q/DQ of INT8 with zero point 0 and float biases; FP16 scales need opset 19. "
            "The INT8 file for the CPU is another one: build from the .int8.onnx in export/"
        )
    if complaint.operator in UNSUPPORTED:
        return "the graph is not one that `cdkd-edge export` writes: export it again"
    if complaint.operator in SINCE:
        return "update TensorRT (with JetPack), or export the graph again with a lower --opset"
    limits = ", ".join(f"{release}: {opset}" for release, opset in OPSETS.items())
    return (
        f"the graph uses opset {complaint.opset} (highest documented, by TensorRT release: {limits}); "
        "export it again with a lower --opset if that is too high"
    )
