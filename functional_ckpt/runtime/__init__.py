"""Threads, host memory, device copies and the fence: what a save and a restore both run on."""
