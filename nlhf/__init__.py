"""Nash learning from human feedback on transformers."""
