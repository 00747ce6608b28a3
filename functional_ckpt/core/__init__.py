"""Pure logic: no I/O, clocks or threads.

`arrays` cuts arrays into chunks, `tree` takes pytrees apart, `records` describes the files on disk,
`restore_plan` plans the restore of each leaf.
"""
