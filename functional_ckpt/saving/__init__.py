"""The save flow, in call order.

The caller's thread, before `CheckpointManager.save` returns:

    saver.Saver.save                  decides, then runs the four stages below
      steps.decide.SaveDecider        whether to save this step                   (no copy)
      lower.lower                     items -> structures and live tensors        (no copy)
      plan.SavePlanner.planning       which rank writes which chunk               (one collective)
      stage.Stager.stage              live tensors -> host memory                 (the only copy)
      background.CommitThread.start   starts the commit
      Staged.wait                     until the caller may change its tensors

The commit thread, on every rank:

    commit.StepCommitter.commit       start, write, gather, publish, prune
      Staged.finish                   remaining copies -> host memory
      write.write_part                this rank's regions -> its data files
      finalize.finalize               on the primary: writes the index and records, syncs
      storage.commit.publish          on the primary: one rename; now the step counts
"""
