"""Steps whose files are on several nodes: the part record, and the rules at a start. Pure."""
