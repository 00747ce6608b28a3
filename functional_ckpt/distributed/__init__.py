"""How the ranks of a job agree: one protocol, for one process and for torch.distributed."""
