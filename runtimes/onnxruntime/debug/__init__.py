"""Values inside an ONNX graph: bisection, and comparison tensor by tensor."""
