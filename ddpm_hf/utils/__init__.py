"""Small helpers that know nothing of diffusion: files, text, seeds, processes, errors."""
