"""The published figures of arXiv 2512.22671, and what explains them."""
