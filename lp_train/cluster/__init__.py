"""The processes of a run: how they start, what they agree on, how they end."""
