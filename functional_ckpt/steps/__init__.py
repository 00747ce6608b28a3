"""The directory of steps: names, metadata, metrics, the writer's lock, and remote tiers."""
