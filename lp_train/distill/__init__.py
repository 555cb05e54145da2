"""Distillation of a paired model from the same weights run in order."""
