"""SPIN (arXiv 2401.01335): a logged reply that the user was happy with, against the policy's own to that dialogue."""

from drift_jax.methods import UNGUIDED, Method


def sides(style: str) -> Method:
    return Method(records="sat", draws=(UNGUIDED,), chosen="logged", rejected="drawn")
