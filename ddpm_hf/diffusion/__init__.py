"""The mathematics of the paper: noise schedules, q and p, objectives, bits/dim. No files, no networks of its own."""
