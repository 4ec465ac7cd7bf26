"""Traced programs to ExecuTorch programs."""
