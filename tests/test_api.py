"""The Python API without torch: what it returns is what the commands write."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from labelled_images import build_data
from scene_helpers import noise, read_labels, write_raster

import cdkd_edge as ce
from cdkd_edge.core.errors import PowerError, UsageError


def test_the_package_is_quick_to_import_and_lists_its_functions():
    script = (
        "import sys, cdkd_edge; print(sorted(cdkd_edge.__all__)); print('numpy' in sys.modules, 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert answer.splitlines()[1] == "False False"
    for name in ce.__all__:
        assert callable(getattr(ce, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ce.nothing


def test_an_array_and_a_file_get_the_same_labels(tmp_path, small_engine_path):
    image = noise(150, 110)
    scene = write_raster(tmp_path / "scene.tif", image)
    result = ce.segment(scene, small_engine_path, tmp_path / "labels.tif", overlap=16)
    with ce.load_engine(small_engine_path) as engine:
        labels = ce.segment(image, engine, overlap=16)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, read_labels(result.output))


@pytest.mark.parametrize("image", [np.zeros((3, 9, 9)), np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)])
def test_an_array_of_another_kind_is_refused(image, small_engine_path):
    with pytest.raises(UsageError, match=r"must be uint8 \[3, H, W\], RGB; this one is"):
        ce.segment(image, small_engine_path)


def test_output_belongs_to_files(tmp_path, small_engine_path):
    with pytest.raises(UsageError, match="give no output"):
        ce.segment(noise(64, 64), small_engine_path, tmp_path / "labels.tif")
    with pytest.raises(UsageError, match="Give output="):
        ce.segment("scene.tif", small_engine_path)


def test_build_evaluate_and_parity(tmp_path, small_graph):
    built = ce.build(small_graph, runtime="cpu", workspace=tmp_path)
    assert built.parent == tmp_path / "engines"
    data = build_data(tmp_path / "data").folder
    scores = ce.evaluate(built, data, schema="dubai")
    assert 0 <= scores.matrix.mean_iou <= 1
    verdict = ce.parity(small_graph, built, data, schema="dubai")
    assert verdict.failures == ()


def test_bench_leaves_a_folder(tmp_path, small_engine_path):
    summary = ce.bench(small_engine_path, tmp_path / "run", seconds=0.2, max_warm_up=0)
    assert (tmp_path / "run" / "report.html").exists()
    assert summary.engine.tile == 64


def test_a_window_of_power_says_why_there_is_none(tmp_path):
    with pytest.raises(PowerError, match="NVML"), ce.power_window("mine", source="nvml"):
        pass
