"""Pure logic: pytrees as structures, chunk grids, records, plans and policies; no I/O, no clock."""
