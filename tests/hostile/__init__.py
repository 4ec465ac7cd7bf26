"""Hostile bundles, recipes, plans, tokenizers and sources, made from good ones by seed: `make test-hostile`."""
