"""LiteRT: its session; `compile` writes the flatbuffers, `debug` looks inside them."""
