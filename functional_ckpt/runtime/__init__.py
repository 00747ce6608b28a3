"""Threads, host memory, device copies and the fence, shared by saves and restores."""
