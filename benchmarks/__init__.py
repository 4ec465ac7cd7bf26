"""Figures behind the claims of the documentation, each with the command that measures it again."""
