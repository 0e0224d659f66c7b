"""The graph for the QGIS plugin Deepness, read and run as the plugin reads and runs it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from cdkd_edge.core.errors import GraphError, ManifestError, NumericalCheckError, UsageError
from cdkd_edge.core.labels import LabelSchema, LandCoverClass, load_schema
from cdkd_edge.graph import outputs as qgis
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.outputs import (
    QGIS_OPSET,
    deepness_metadata,
    overlap_percent,
    qgis_graph,
    require_gsd,
    with_output,
    write_qgis,
)
from cdkd_edge.raster.grid import default_overlap

SCHEMA = load_schema("dubai")


class Plugin:
    """What Deepness does with a file, after its documentation: settings from JSON, tiles / 255, argmax."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (self.input,) = self.session.get_inputs()
        (self.output,) = self.session.get_outputs()
        self._metadata = self.session.get_modelmeta().custom_metadata_map

    def setting(self, key):
        return json.loads(self._metadata[key])

    def class_names(self):
        """An object from consecutive numbers, as text, to names."""
        names = self.setting("class_names")
        numbers = sorted(map(int, names))
        assert numbers == list(range(len(names))), "missing class label"
        return [names[str(number)] for number in numbers]

    def labels(self, tile):
        """Of one tile ``[H, W, 3]`` uint8; thresholded, then argmax."""
        mean, std = (np.array(self.setting(f"standardization_{what}"), np.float32) for what in ("mean", "std"))
        batch = (np.float32(tile[None] * 1.0 / 255.0) - mean) / std
        (result,) = self.session.run(None, {self.input.name: np.transpose(batch, (0, 3, 1, 2))})
        assert result.dtype == np.float32
        result = result.copy()
        result[result < self.setting("seg_thresh")] = 0.0
        return result.argmax(axis=1)[0]


@pytest.fixture(scope="module")
def model(small_weights, small_config):
    return build_graph(small_weights, small_config, opset=QGIS_OPSET)


@pytest.fixture(scope="module")
def written(tmp_path_factory, model, small_graph):
    path = tmp_path_factory.mktemp("export") / "small.qgis.onnx"
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    return write_qgis(copy, path, small_graph, SCHEMA, 64, 0.3)


@pytest.fixture(scope="module")
def plugin(written):
    return Plugin(written.path)


def test_the_plugin_reads_every_setting(plugin):
    """Keys and types of its page "Adding metadata to ONNX model"; any other value would not load or be ignored."""
    assert plugin.setting("model_type").capitalize() == "Segmentor"
    assert plugin.class_names() == list(SCHEMA.class_names)
    assert float(plugin.setting("resolution")) == 30.0, "centimetres per pixel"
    assert int(plugin.setting("tile_size")) == int(plugin.setting("tiles_size")) == 64
    assert int(plugin.setting("tiles_overlap")) == 25
    assert float(plugin.setting("seg_thresh")) == 0
    assert int(plugin.setting("seg_small_segment")) == 0
    for key in ("mean", "std"):
        assert [float(value) for value in plugin.setting(f"standardization_{key}")] == [key == "std"] * 3


def test_its_shapes_are_the_plugins(plugin):
    """One input and one output; batch, channels, square sides."""
    assert (plugin.input.shape, plugin.input.type) == ([1, 3, 64, 64], "tensor(float)")
    assert (plugin.output.shape, plugin.output.type) == ([1, 5, 64, 64], "tensor(float)")


def test_labels_are_those_of_the_graph_for_engines(plugin, small_graph, small_tiles):
    session = onnxruntime.InferenceSession(str(small_graph), providers=["CPUExecutionProvider"])
    extremes = [np.zeros_like(small_tiles[0]), np.full_like(small_tiles[0], 255)]
    for tile in [*small_tiles, *extremes]:
        (expected,) = session.run(["labels"], {"image": tile[None]})
        assert (plugin.labels(tile.transpose(1, 2, 0)) == expected[0]).all()


def test_all_256_values_arrive_as_they_were(tmp_path, model):
    """value / 255 in FP32, times 255, is not always the value; rounded it is."""
    graph = qgis_graph(onnx.ModelProto.FromString(model.SerializeToString()), SCHEMA, 64, 0.3)
    graph.graph.output.append(onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.resize(np.arange(256), (1, 3, 64, 64))
    (found,) = session.run(["pixels"], {"image": np.float32(values * 1.0 / 255.0)})
    assert (found == values).all()


def test_probabilities_are_probabilities(plugin, small_tiles):
    (found,) = plugin.session.run(None, {"image": np.float32(small_tiles[:1] / 255.0)})
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-5
    assert found.min() >= 0


def test_the_file_is_plain_onnx_of_an_opset_that_the_plugin_reads(written):
    model = onnx.load(written.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert model.ir_version <= 8, "as ONNX Runtime 1.12 reads"
    assert not any(node.op_type == "ArgMax" for node in model.graph.node), "labels would be taken for probabilities"
    used = {name for node in model.graph.node for name in node.input}
    assert {item.name for item in model.graph.initializer} <= used


def test_what_was_written_is_said(written):
    assert written.artefact.file == "small.qgis.onnx"
    assert written.artefact.bytes == written.path.stat().st_size
    assert (written.gsd, written.label_agreement) == (0.3, 1.0)


@pytest.mark.parametrize("tile", [16, 64, 256, 500, 512, 1024, 2048])
def test_the_overlap_is_that_of_segment(tile):
    percent = overlap_percent(tile)
    assert 0 <= percent * tile / 100 - default_overlap(tile) < tile / 100


def test_names_in_any_script_survive():
    schema = LabelSchema("x", (LandCoverClass("forêt", (0, 0, 0), 0), LandCoverClass('"水"', (1, 1, 1), 1)))
    metadata = deepness_metadata(schema, 64, 0.5)
    assert json.loads(metadata["class_names"]) == {"0": "forêt", "1": '"水"'}
    assert all(isinstance(value, str) for value in metadata.values())


@pytest.mark.parametrize("gsd", [0.0, -0.5, float("nan"), float("inf"), 5000.0])
def test_a_pixel_size_that_is_none(gsd):
    with pytest.raises(UsageError, match=r"--gsd must be between 0\.001 and 1000 m"):
        require_gsd(gsd)


def test_a_graph_with_other_labels_is_not_written(tmp_path, model, small_graph, monkeypatch):
    path = tmp_path / "small.qgis.onnx"
    real = qgis.qgis_graph

    def wrong(*arguments):
        changed = real(*arguments)
        next(node for node in changed.graph.node if node.op_type == "Softmax").attribute[0].i = 2
        return changed

    monkeypatch.setattr(qgis, "qgis_graph", wrong)
    with pytest.raises(NumericalCheckError, match="gives another label than"):
        write_qgis(onnx.ModelProto.FromString(model.SerializeToString()), path, small_graph, SCHEMA, 64, 0.3)
    assert list(tmp_path.iterdir()) == []


def test_only_a_graph_with_labels_alone_will_do(model):
    with pytest.raises(GraphError, match="does not end in labels alone"):
        qgis_graph(with_output(model, "confidence", 5), SCHEMA, 64, 0.3)


def test_it_is_replaced_only_by_its_like(tmp_path, model, small_graph, written):
    path = tmp_path / "small.qgis.onnx"
    path.write_bytes(written.path.read_bytes())

    def write():
        return write_qgis(onnx.ModelProto.FromString(model.SerializeToString()), path, small_graph, SCHEMA, 64, 0.5)

    assert write().gsd == 0.5
    foreign = onnx.load(path)
    foreign.producer_name = "pytorch"
    for mine in (b"mine", b"", foreign.SerializeToString(), small_graph.read_bytes()):
        path.write_bytes(mine)
        with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
            write()
        assert path.read_bytes() == mine
