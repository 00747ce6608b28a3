"""What a restore will do with each leaf, worked out in full before the first byte is read."""
