"""The table of attention variants: stages are kept, failures are told and tried again, networks are not mixed up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "attention_variants.py").exists():
    pytest.skip("the suite is not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import attention_variants as script  # noqa: E402

MODES = [
    {"mode": mode, "modelled_fps": fps, "modelled_fps_range": [fps - 2, fps + 2]}
    for mode, fps in (("15W", 7), ("MAXN", 20))
]


class Commands:
    """Answers as the commands do, and notes what was asked."""

    def __init__(self):
        self.asked, self.fails = [], None

    def __call__(self, study, *words):
        words = tuple(map(str, words))
        self.asked.append(words)
        if self.fails == words[0]:
            raise RuntimeError(f"{words[0]} is ill")
        if "-o" in words and words[0] != "build":
            Path(words[words.index("-o") + 1]).write_text("a network")
        record = {"command": "c", "recipe": {}, "training_tiles": 9, "before": {}, "after": {}, "run": {"seconds": 90}}
        return {
            "convert": {"attention": ["window 16"], "macs": 126e9, "notes": []},
            "evaluate": {"mean_iou": 0.5, "classes": [{"name": "road", "iou": 0.5}], "tiles": 36, "seconds": 1.0},
            "info": {"cost": {"total_macs": 126e9}, "training": {**record, "distilled": record}},
            "inspect": {
                "manifest": {
                    "attention_fused": 12,
                    "tensorrt": {"layers": 121, "traffic_bytes": 1.21e9, "scratch_bytes": 1, "weights_bytes": 1},
                }
            },
            "roofline": {"estimates": MODES},
        }.get(words[0], {})

    def named(self, name):
        return [words for words in self.asked if words[0] == name]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in ("tile1_001", "tile5_001", "tile7_002"):
        (tmp_path / "data" / "images" / f"{name}.jpg").touch()
    (tmp_path / "dubai.pt").write_text("a checkpoint")
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    commands = Commands()

    class Loaded:
        def __init__(self, path, threads):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(script.Study, "command", lambda study, *words: commands(study, *words))
    monkeypatch.setattr(script, "load_engine", Loaded)
    monkeypatch.setattr(script, "speed_ratio", lambda engine, other: 2.0)
    seams = {"changes": [{"ratio": 1.25}], "agreement": []}
    monkeypatch.setattr(script, "measure_seams", lambda engine, images, overlap: seams)
    return commands


def run(data, *more):
    words = [data / "dubai.pt", data / "data", "--folder", data / "out", "--output", data / "table", *more]
    assert script.main(list(map(str, words))) == 0
    return (data / "table.md").read_text(encoding="utf-8")


def row(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |") and line.count("|") > 10]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_every_stage_is_in_the_row(data, commands):
    table = run(data, "--variants", "as trained", "window16/pooled2")
    assert row(table, "window16/pooled2") == [
        *("window16/pooled2", "126.0", "50.00", "50.00", "50.00", "1.5", "121 / 121", "1.21 / 1.21", "12 / 12"),
        *("20.0 (18.0 to 22.0)", "20.0 (18.0 to 22.0)", "16.1", "0.50", "1.25"),
    ]
    assert row(table, "as trained")[5] == "0.0"
    assert "| window16/pooled2 | 7.0 / 7.0 | 20.0 / 20.0 |" in table
    assert "Failed" not in table


def test_what_is_done_is_not_done_again(data, commands):
    run(data, "--variants", "as trained", "pooled2")
    done = len(commands.asked)
    first = run(data, "--variants", "as trained", "pooled2")
    assert (len(commands.asked), run(data, "--variants", "as trained", "pooled2")) == (done, first)


def test_a_failed_stage_is_told_and_tried_again(data, commands):
    commands.fails = "distill"
    table = run(data, "--variants", "pooled2", "--stages", "convert", "recover")
    assert "- pooled2, recover: distill is ill" in table
    assert len(commands.named("distill")) == 1
    commands.fails = None
    table = run(data, "--variants", "pooled2", "--stages", "convert", "recover")
    assert "Failed" not in table
    assert row(table, "pooled2")[5] == "1.5"
    assert len(commands.named("convert")) == 1


def test_the_validation_scene_is_in_no_training(data, commands):
    run(data)
    for name in ("distill", "calibrate"):
        for words in commands.named(name):
            assert [word for word in words if "tile" in word and "*" in word] == [
                str(data / "data" / "images" / f"{scene}_*") for scene in ("tile1", "tile7")
            ]
    for words in commands.named("finetune"):
        assert words[words.index("--val-scenes") + 1] == "tile5"
        assert words[words.index("--validate-every") + 1] == words[words.index("--epochs") + 1]
    assert all(words[words.index("--scenes") + 1] == "tile5" for words in commands.named("evaluate"))


def test_tile_512_has_the_network_as_trained_and_its_own_overlap(data, commands):
    table = run(data)
    small = [words for words in commands.named("evaluate") if "512" in words]
    assert {words[words.index("--overlap") + 1] for words in small} == {"128", "64"}
    assert {Path(words[1]).parent.name for words in small} == {"original"}
    # (512 - 64) ** 2 of 512 ** 2 pixels are a tile's own.
    assert row(table, "as trained, tile 512, overlap 64")[11] == f"{20 * 448**2 / 1e6:.1f}"
    assert len(commands.named("finetune")) == len(script.VARIANTS) - 2  # rows of one network share it


def test_the_sparse_row_is_pruned_and_built_sparse(data, commands):
    run(data, "--variants", "window16/pooled2", "window16/pooled2, 2:4 sparse")
    dense, sparse = commands.named("convert")
    assert ("--sparse" in dense, "--sparse" in sparse) == (False, True)
    engines = [words for words in commands.named("build") if "--fp16" in words]
    assert ["--sparse" in words for words in engines] == [False, True]
    assert len(commands.named("distill")) == 2


def test_a_result_of_a_stage_is_plain_json(data, commands):
    run(data, "--variants", "pooled2")
    found = json.loads((data / "out" / "pooled2" / "speed.json").read_text())
    assert found["fp16"]["modes"] == {"15W": [7, 5, 9], "MAXN": [20, 18, 22]}
