"""Model cards, uploads and Spaces."""
