"""Core ML: packages, their evaluation without a Mac (`mil`); `compile` writes them, `debug` looks inside them."""
