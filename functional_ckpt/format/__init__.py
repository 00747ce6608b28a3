"""One item on disk: an OCDBT database of Zarr arrays, and its records.

Data files are written by `write_files` and the index by `write_index`, to files and to objects.
`read_direct` and `read_store` read them, and `read_tensorstore` the arrays of Orbax's checkpoints.
"""
