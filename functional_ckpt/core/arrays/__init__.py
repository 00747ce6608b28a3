"""Arrays as data: specs, shardings, chunk grids, and the plans of writes and reads."""
