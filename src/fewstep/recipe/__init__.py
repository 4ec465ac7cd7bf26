"""What a build is told to do: recipes, quantization settings, and what each target can store. Needs no torch."""
