"""Whether an engine fits this TensorRT and this GPU, found out before TensorRT is given the file.

Engines are neither portable across TensorRT releases nor across GPU models. TensorRT's own answers to a foreign
engine range from a log line about a magic tag to a crash.
"""

from __future__ import annotations

from cdkd_edge.engines.tensorrt.api import TensorRT
from cdkd_edge.engines.tensorrt.device import Gpu, NoGpu
from cdkd_edge.errors import EngineError, ManifestError
from cdkd_edge.manifest import EngineManifest
from cdkd_edge.output_kinds import build_options


def require_loadable(manifest: EngineManifest, api: TensorRT, device: Gpu | NoGpu) -> None:
    """Compare an engine's manifest with what is here. Its file must have been checked against the manifest before.

    Raises:
        ManifestError: the manifest does not say what built the engine.
        EngineError: it was built by another TensorRT or for another GPU; says which, and what builds it here.
    """
    name, build = manifest.artefact.file, manifest.tensorrt
    if build is None:
        raise ManifestError(f"the manifest of {name} does not say which TensorRT built it", hint=_rebuild(manifest))
    if isinstance(device, NoGpu):
        raise EngineError(
            f"{name} is a TensorRT engine and {device.reason}",
            hint="here the CPU engine runs: cdkd-edge build --runtime cpu",
        )
    differences = []
    if (manifest.runtime, build.version) != (api.kind, api.version):
        built_by = TensorRT(None, manifest.runtime, build.version)
        differences.append(f"it was built by {built_by.name}, here is {api.name}")
    if build.targets:
        if device.compute_capability not in build.targets:
            differences.append(
                f"it was compiled for compute capability {', '.join(build.targets)}, "
                f"the {device.name} here has {device.compute_capability}"
            )
    elif (build.gpu, build.compute_capability) != (device.name, device.compute_capability):
        differences.append(
            f"it was built on {build.gpu} (compute capability {build.compute_capability}), "
            f"here is {device.name} ({device.compute_capability})"
        )
    if differences:
        raise EngineError(f"{name} does not fit: {'; '.join(differences)}", hint=_rebuild(manifest))


def _rebuild(manifest: EngineManifest) -> str:
    options = build_options(manifest.precision, manifest.output)
    return f"build it again here from {manifest.graph.file}: cdkd-edge build {options} --runtime tensorrt"
