"""Arrays as data: specs, shardings, chunk grids, and the plans of who writes and reads what."""
