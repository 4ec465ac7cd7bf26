"""What leaves the loop of networks of full size when their steps are known: ``python -m benchmarks.static``."""
