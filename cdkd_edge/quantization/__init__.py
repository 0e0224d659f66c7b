"""INT8: which layers, with which scales, as a graph for TensorRT and as its twin for a CPU."""
