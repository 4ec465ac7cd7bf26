"""The reference itself: traced programs run by PyTorch, in float32 and float64."""
