"""ONNX Runtime: its session; `compile` writes the graphs, `debug` looks inside them."""
