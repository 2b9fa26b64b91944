"""Algorithm 2: from noise to images, and what the paper shows of it."""
