"""What TensorRT's errors mean and what helps: of its ONNX parser about a node, and of its builder.

What is said about operators is from https://github.com/onnx/onnx-tensorrt, ``docs/Changelog.md`` of 8.5 to 10.15,
``docs/operators.md`` of 8.5, 9.2, 10.0 and 10.15. The message says so where they are silent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SINCE: Mapping[str, str] = {
    "Attention": "10.14", "BlackmanWindow": "10.4", "DeformConv": "10.1", "GridSample": "8.5",
    "GroupNormalization": "8.6", "HammingWindow": "10.4", "HannWindow": "10.4", "Hardmax": "9.2", "IsInf": "8.6",
    "LayerNormalization": "8.6", "MeanVarianceNormalization": "8.5", "Mod": "8.5", "NonZero": "8.5",
    "RMSNormalization": "10.15", "RandomNormal": "8.5", "RoiAlign": "8.5", "RotaryEmbedding": "10.15", "STFT": "10.5",
    "TensorScatter": "10.15", "Trilu": "8.5",
}  # fmt: skip
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

    node: str  # name of the node; empty if it has none
    operator: str  # empty if the error is not about a node
    domain: str
    opset: int  # opset of ONNX's own domain that the graph uses
    text: str  # in the parser's words


def explain(complaint: ParserComplaint, tensorrt: str) -> tuple[str, str]:
    """Message and hint for the parser's first error; ``tensorrt`` is its name and version."""
    said = " ".join(complaint.text.split())[:240]
    if not complaint.operator:
        return f"{tensorrt} cannot read the graph: {said}", "export it again"
    node = f"node {complaint.node!r}" if complaint.node else "a node without a name"
    if complaint.domain not in ("", "ai.onnx"):
        return (
            f"{tensorrt} does not take {node}, a {complaint.domain}.{complaint.operator}: {said}",
            "ONNX Runtime alone has this operator, so the file may be a CPU engine: build from the graph in export/",
        )
    since = "not known since which release TensorRT's parser has it"
    if complaint.operator in SINCE:
        since = f"in TensorRT's parser since {SINCE[complaint.operator]}"
    elif complaint.operator in UNSUPPORTED:
        since = "not in TensorRT's parser as of 10.15"
    return f"{tensorrt} does not take {node}, an ONNX {complaint.operator} ({since}): {said}", _about_node(complaint)


def _about_node(complaint: ParserComplaint) -> str:
    if complaint.operator in ("DequantizeLinear", "QuantizeLinear"):
        return (
            "TensorRT takes INT8 Q/DQ with zero point 0 and float biases; FP16 scales need opset 19. "
            "A CPU engine has others: build from the .int8.onnx in export/"
        )
    if complaint.operator in UNSUPPORTED:
        return "`cdkd-edge export` writes no such operator: export the graph again"
    if complaint.operator in SINCE:
        return "update TensorRT (with JetPack), or export the graph again with a lower --opset"
    limits = ", ".join(f"{release}: {opset}" for release, opset in OPSETS.items())
    return (
        f"the graph uses opset {complaint.opset} (highest documented, by TensorRT release: {limits}); "
        "export it again with a lower --opset if that is too high"
    )


_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|insufficient memory|Could not find any implementation|MemoryAllocation|bad_alloc"
    r"|Requested amount of GPU memory|MEM_ALLOC_FAILED",
    re.IGNORECASE,
)
"""In TensorRT's error lines. It could not "find any implementation" if no kernel fits into the free memory."""
_BUILDER: Mapping[str, str] = {
    r"Target GPU SM 87 is not supported": "an Orin needs the TensorRT of its JetPack. On JetPack 7.2 that is 10.16; "
    "older ones for arm64 servers have no Orin: sudo apt install tensorrt-libs python3-libnvinfer",
    r"Target GPU SM \d+ is not supported": "this TensorRT has no code for this GPU: install a newer release "
    "for a newer GPU, an older one for an older GPU",
    r"Unable to load library: libnvinfer_builder_resource": "TensorRT is installed in part; its builder may need "
    "libraries that are named after other GPUs (JetPack 7.2 has none for Orin): sudo apt install tensorrt-libs",
}
"""What helps, by the builder's words. Seen in NVIDIA-ISAAC-ROS/isaac-ros-cli#22, DDTRobot/tita_rl_sim2sim2real#7,
OE4T/meta-tegra#2240 and NVlabs/GR00T-WholeBodyControl#195."""


def is_out_of_memory(line: str) -> bool:
    """Whether an error line says that there is too little memory."""
    return bool(_OUT_OF_MEMORY.search(line))


def advice(errors: Iterable[str]) -> str | None:
    """What helps against errors of the builder; None if that is not known."""
    said = " ".join(errors)
    return next((text for words, text in _BUILDER.items() if re.search(words, said)), None)
