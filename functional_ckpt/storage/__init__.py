"""Files, databases and the commit protocol."""
