"""Pytrees as structures: flattened into named leaves, encoded for storage, and decoded again."""
