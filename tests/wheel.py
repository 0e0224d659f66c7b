"""Tries an installed package, away from the repository: `make test-wheel` runs this in the wheel's environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path


def main() -> None:
    command = Path(sys.executable).with_name("cdkd-edge")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        import cdkd_edge

        assert "site-packages" in cdkd_edge.__file__, cdkd_edge.__file__
        assert (resources.files("cdkd_edge") / "py.typed").is_file()
        version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
        assert cdkd_edge.__version__ in version, version
        subprocess.run([command, "demo", "--json"], stdout=subprocess.PIPE, check=True)
        demo = Path("cdkd-edge-demo")
        for found in ("demo_scene_labels.tif", "engines", "benchmarks"):
            assert (demo / found).exists(), found
        answer = subprocess.run([command, "doctor", "--json"], capture_output=True, text=True, check=False)
        assert json.loads(answer.stdout), answer.stderr
        (engine,) = (demo / "engines").glob("*.onnx")
        with cdkd_edge.load_engine(engine) as loaded:
            assert loaded.tile > 0
    print(f"the wheel of {cdkd_edge.__version__} works without the repository")


if __name__ == "__main__":
    main()
