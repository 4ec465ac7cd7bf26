"""What is proved of a bundle beside its networks: the user's own call, the host, the golden pack, the manifest."""
