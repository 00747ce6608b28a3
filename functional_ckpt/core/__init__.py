"""Pure logic: computes with data, does no I/O, reads no clock, starts no thread.

`arrays` cuts arrays into chunks, `tree` takes pytrees apart, `records` describes what is on disk,
`restore_plan` decides what a restore does with each leaf.
"""
