"""Prompt to image on any backend: tokenizer, sampler, and the graphs of steps and tiles. Imports no compiler."""
