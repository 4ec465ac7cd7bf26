"""Faults seeded into verified bundles, with hashes made to fit: what verification notices of them, and names."""
