"""Which bits each tensor gets: sensitivities, candidates, and the integer program that chooses."""
