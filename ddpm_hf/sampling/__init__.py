"""From seeds to files: many images, many processes, resumable."""
