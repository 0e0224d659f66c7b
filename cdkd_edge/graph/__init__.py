"""ONNX graphs: written, checked, and derived in FP16, INT8 and for ONNX Runtime on a CPU."""
