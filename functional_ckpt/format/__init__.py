"""One item on disk: an OCDBT database of Zarr arrays, and its records.

The fast path writes and reads local files itself (`write_direct`, `data_file`, `read_direct`);
everywhere else TensorStore does it (`write_tensorstore`, `read_tensorstore`).
"""
