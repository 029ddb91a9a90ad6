"""DRIFT (arXiv 2510.02341): the policy's reply to the dialogue with the complaint, against the logged one."""

from drift_jax.methods import Method


def sides(style: str) -> Method:
    return Method(records="dsat", draws=(style,), chosen="drawn", rejected="logged")
