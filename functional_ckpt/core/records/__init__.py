"""The records of a checkpoint as data: native, Orbax's, and the merge of several ranks' records."""
