"""Memory and time of compiling networks of 9 M to 2.6 B parameters: ``python -m benchmarks.scale``."""
