"""`drift report` and `drift card`: what runs have left on disk, as one page that needs no network, and as a model card."""
