"""Components as traced programs, in real numbers."""
