"""LiteRT and ExecuTorch, each in an environment of its own."""
