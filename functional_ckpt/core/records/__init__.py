"""The records of a checkpoint as data: ours, Orbax's, and how those of several ranks merge."""
