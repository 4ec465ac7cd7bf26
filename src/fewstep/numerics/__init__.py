"""Noise, guidance, metrics, inputs and outputs as arrays: the arithmetic that every runtime shares, without torch."""
