"""A paired model measured against its sequential original."""
