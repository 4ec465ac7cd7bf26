"""The built-in generator: 64x64 pictures in the style of emoji, from a prompt, in one to eight steps."""
