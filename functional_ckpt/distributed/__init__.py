"""Coordination between ranks: one protocol, for a single process and for torch.distributed."""
