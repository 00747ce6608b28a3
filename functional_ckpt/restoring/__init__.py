"""The restore flow, in call order.

restorer.Restorer.restore         agrees on a step, and finds the nearest tier that holds it
  restore.restore_checkpoint      matches everything, then reads, then lifts
    match.match_items             each item with its target, before any read
      core.restore_plan.match     leaf by leaf: read, keep, or mismatch
    read.read_all                 reads and verifies the chunks
      destinations                the memory to read into: the target's or new memory
      shared_read                 with `share_reads`: each shared chunk is read by one rank
      node_read                   with `node_local`: each chunk is read on a node that has its file
    Handler.lift                  assigns the values to the module, optimizer, ...
"""
