"""The restore flow, in call order.

restorer.Restorer.restore         the ranks agree on a step; the nearest tier that holds it
restore.restore_checkpoint      match everything, then read, then lift
match.match_items             each item against its target, before any read
core.restore_plan.match     leaf by leaf: read, keep, or mismatch
read.read_all                 reads and verifies the chunks
destinations                where bytes go: the target's memory or new memory
shared_read                 with `share_reads`: ranks read for each other
Handler.lift                  hands the values to the module, optimizer, ...
"""
