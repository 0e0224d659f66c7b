"""Graph clean-up by onnxsim, and the two things it must not do to this graph."""

from __future__ import annotations

import onnx

from cdkd_edge.errors import GraphError, MissingExtraError

# TensorRT and ONNX Runtime both keep [N, L, D] tokens fastest as MatMul + Add. onnxsim would turn them
# into rank-2 Gemms between Reshapes: more nodes, and a form that TensorRT compiles worse in FP16.
SKIPPED_PASSES = (
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_transpose_into_gemm",
    "fuse_qkv",
)


def simplify_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what contributes nothing (dead ends, no-ops, duplicate constants); check the result.

    Returns:
        The simplified graph, or ``model`` itself if simplification made it larger.

    Raises:
        MissingExtraError: onnxsim is not installed.
        GraphError: the simplified graph is not valid ONNX.
    """
    try:
        import onnxsim
    except ImportError:
        raise MissingExtraError("onnxsim", "export", "simplifying the graph") from None
    simplified: onnx.ModelProto
    simplified, valid = onnxsim.simplify(model, skipped_optimizers=list(SKIPPED_PASSES))
    if not valid:
        raise GraphError("onnxsim changed what the graph computes")
    if len(simplified.graph.node) > len(model.graph.node):
        simplified = model
    # onnxsim leaves a diary in the metadata; a deployed graph carries facts about the network only.
    del simplified.metadata_props[:]
    simplified.producer_name, simplified.producer_version = model.producer_name, model.producer_version
    try:
        onnx.checker.check_model(simplified, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the exported graph is not valid ONNX: {error}") from None
    return simplified
