"""TensorRT: engines and their session; `compile` writes the networks that it parses."""
