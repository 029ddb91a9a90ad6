"""`drift report` and `drift card`: what runs have left on disk, as one page that loads nothing, and as a model card."""
