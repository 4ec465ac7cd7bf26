"""Bundles and LoRAs in other people's tools, each in an environment of its own."""
