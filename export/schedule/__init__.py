"""A scheduler as a table: probed, solved for its coefficients, checked."""
