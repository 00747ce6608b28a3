"""The data files of an item as they will be written: names, headers, offsets. Pure."""
