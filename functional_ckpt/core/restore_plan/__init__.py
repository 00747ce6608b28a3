"""The plan of a restore, complete before the first byte is read."""
