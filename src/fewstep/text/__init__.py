"""A prompt's way to token ids: named operations, tokenizers, and the texts that are compared. Needs no torch."""
