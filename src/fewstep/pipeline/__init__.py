"""The stages as one pipeline: build, verify, and what they share. The command line imports from here."""
