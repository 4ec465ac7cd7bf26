"""What a pipeline makes of a text before and in its tokenizer, read off its own code."""
