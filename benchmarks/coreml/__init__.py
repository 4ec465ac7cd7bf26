"""Ways of compressing for Core ML: size and quality of the built-in generator, evaluated from its packages."""
