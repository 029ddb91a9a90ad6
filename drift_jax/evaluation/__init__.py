"""Whether a policy got better: what the published numbers are computed from, and how sure one can be of them."""
