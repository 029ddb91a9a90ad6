"""`python -m drift_jax` is `drift`."""

from drift_jax.cli import main

main()
