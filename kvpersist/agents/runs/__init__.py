"""Round an agent's run: history in, a turn out."""
