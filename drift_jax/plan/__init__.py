"""`drift plan`: compiles the real programs of a run for a slice, and says what fits and what it would cost."""
