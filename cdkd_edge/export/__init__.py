"""From a network to an ONNX graph that is checked before anybody builds it."""
