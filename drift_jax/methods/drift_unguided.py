"""DRIFT without its guidance: the policy's reply to the dialogue alone, against the logged one."""

from drift_jax.methods import UNGUIDED, Method


def sides(style: str) -> Method:
    return Method(records="dsat", draws=(UNGUIDED,), chosen="drawn", rejected="logged")
