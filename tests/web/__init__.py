"""The web app and its library against Python: vectors, browser, server."""
