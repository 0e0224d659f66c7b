"""Engines by TensorRT 10.3 ... 11.x and TensorRT-RTX: build, inspect, check before loading."""
