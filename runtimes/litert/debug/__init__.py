"""Values inside a LiteRT model, compared tensor by tensor."""
