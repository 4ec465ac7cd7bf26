"""The harness that compares: checks, limits, noise floors. Runs nothing itself, and imports no backend."""
