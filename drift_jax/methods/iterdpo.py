"""Iterative DPO: the policy's replies to the dialogue alone and with the complaint, ranked by `recipe.ranker`."""

from drift_jax.methods import UNGUIDED, Method


def sides(style: str) -> Method:
    return Method(records="dsat", draws=(UNGUIDED, style), chosen="best", rejected="worst")
