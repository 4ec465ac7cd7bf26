"""The built-in generator on every runtime and executor: what each recipe costs there, and who agrees with whom."""
