"""Pure logic: no I/O, clocks or threads.

`arrays` cuts arrays into chunks, `tree` takes pytrees apart, `records` describes what is on disk,
`restore_plan` decides what a restore does with each leaf.
"""
