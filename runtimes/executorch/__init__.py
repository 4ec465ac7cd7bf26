"""ExecuTorch with XNNPACK: its session; `compile` writes the programs, `debug` looks inside them."""
