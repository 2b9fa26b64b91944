"""Algorithm 1: configuration, batches, the update, checkpoints and what a run writes."""
