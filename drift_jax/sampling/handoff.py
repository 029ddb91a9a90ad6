"""The hand-off of a policy to a server: does it answer with the weights that we think it has?

A few texts are scored twice, by the policy as we compute it and by the server. Ours is computed in a process of its
own, which gives the accelerator back before a server takes it:

    python -m drift_jax.sampling.handoff MODEL_DIR DTYPE LONGEST OUT.json [cpu]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from drift_jax.config import MeshConfig
from drift_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from drift_jax.endpoint import Endpoint
from drift_jax.errors import DriftError, EndpointError, StageError
from drift_jax.files import write_json
from drift_jax.models.logps import token_logps
from drift_jax.models.policy import bind, load_policy
from drift_jax.records import Message
from drift_jax.sharding import build_layout, build_sharding, put, replicated, use_layout

# Prose, code, other scripts, numbers: a wrong row of an embedding or a wrong rotation shows somewhere.
_PROBES = (
    (
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones, so blue comes from all sides.",
    ),
    (
        "Sum a list in Python.",
        "def total(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s",
    ),
    ("Wie heißt das auf Deutsch?", "Der Fluss ist größer als früher. 这条河比以前大。 Река стала больше. 🙂"),
    ("What is 17 * 23, and when was that?", "17 * 23 = 391. On 4 March 1391, at 09:45, 128 people were counted."),
)
# Mean absolute difference per token, in nats, that roundings may make.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}


def probe_ids(tokenizer: ChatTokenizer, longest: int) -> list[tuple[int, ...]]:
    """The probe texts as the policy's template and tokenizer write them, each shorter than `longest` tokens."""
    cut = slice(max(2, longest - 1))
    return [
        tuple(tokenizer.encode_chat([Message("user", a), Message("assistant", b)], add_generation_prompt=False)[cut])
        for a, b in _PROBES
    ]


def model_logps(model_dir: Path, dtype: str, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """log p(token | what is before it) of all tokens but the first of each text, in nats, on this process's devices."""
    layout = build_layout(MeshConfig(), jax.local_devices())
    policy = load_policy(model_dir, layout, dtype, dtype)
    ways = layout.ways("batch")
    rows, width = -(-len(texts) // ways) * ways, max(map(len, texts))
    ids = np.zeros((rows, width), np.int32)
    for row, text in zip(ids, texts, strict=False):
        row[: len(text)] = text
    score = jax.jit(partial(_score, policy.graphdef), out_shardings=replicated(layout))
    with use_layout(layout):
        scored = np.asarray(score(policy.params, put(ids, build_sharding(layout, ("batch", None), ids.shape, "probe"))))
    return [scored[row, : len(text) - 1].tolist() for row, text in enumerate(texts)]


def _score(graphdef: Any, params: dict[str, Any], ids: Int[Array, "R T"]) -> Float[Array, "R T-1"]:
    model = bind(graphdef, params)
    hidden = model.hidden(ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    sources = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1), (ids.shape[0], ids.shape[1] - 1))
    return token_logps(hidden, model.output_table, sources, ids[:, 1:], jnp.int32(ids.shape[1] - 1))


def server_logps(endpoint: Endpoint, name: str, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same numbers, of a server.

    Raises:
      EndpointError: it does not answer, or not with prompt log-probs of these tokens.
    """
    body = {"model": name, "prompt": [list(t) for t in texts], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = endpoint.post("/completions", body)
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            [entry[str(token)]["logprob"] for token, entry in zip(text[1:], choice["prompt_logprobs"][1:], strict=True)]
            for text, choice in zip(texts, choices, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise EndpointError(
            f"{endpoint.base_url}: the answer has no log-probs of the prompt ({type(error).__name__}: {error}). A "
            "vLLM server with prompt_logprobs is needed.",
            passing=False,
        ) from None


@dataclass(frozen=True)
class Comparison:
    """Means over all tokens of the probe, in nats per token."""

    ours: float
    theirs: float
    difference: float  # mean of the absolute differences


def compare_logps(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Comparison:
    a, b = (np.array([x for text in texts for x in text]) for texts in (ours, theirs))
    return Comparison(float(a.mean()), float(b.mean()), float(np.abs(a - b).mean()))


def check_handoff(found: Comparison, dtype: str, source: str, model_dir: Path, tied: bool) -> None:
    """Raises `StageError` with both numbers when the server's log-probs are not those of the policy."""
    tolerance = TOLERANCES[dtype]
    if found.difference <= tolerance:  # not for NaN
        return
    trap = (
        " it has loaded them in place, which leaves the output head of a model with tied embeddings as it was;"
        if tied
        else ""
    )
    raise StageError(
        f"{source} does not answer with the policy in {model_dir}: on the probe texts the mean log-prob of a token is "
        f"{found.theirs:.4f} nats there and {found.ours:.4f} here; tokens differ by {found.difference:.4g} on average, "
        f"{tolerance:g} is allowed in {dtype}. Possible causes: it has older weights;{trap} another model; another "
        f"tokenizer or template; another dtype. Restart it with this directory and --dtype {dtype}."
    )


def compute_apart(model_dir: Path, dtype: str, longest: int, out: Path, on_cpu: bool) -> list[list[float]]:
    """`model_logps` of the probe texts, by a process of its own; the result stays in `out`.

    Raises:
      StageError: the process failed, with the end of what it said.
    """
    command = [sys.executable, "-m", "drift_jax.sampling.handoff", str(model_dir), dtype, str(longest), str(out)]
    # What a server or another process holds of the accelerator stays there.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if cache:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    out.unlink(missing_ok=True)
    done = subprocess.run([*command, *(["cpu"] if on_cpu else [])], env=env, capture_output=True, text=True)
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if "logps" in found:
        return found["logps"]
    why = found.get("error") or f"exit code {done.returncode}: {done.stderr.strip()[-1500:]}"
    raise StageError(f"the log-probs that the server is compared with could not be computed: {why}")


def main(model: str, dtype: str, longest: str, out: str, *device: str) -> None:
    """The process of `compute_apart`."""
    from drift_jax.sampling.supervise import die_with_parent

    die_with_parent()
    if "cpu" in device:
        jax.config.update("jax_platforms", "cpu")
    try:
        texts = probe_ids(load_tokenizer(model), int(longest))
        logps = model_logps(Path(model), dtype, texts)
        result: dict[str, Any] = {"dtype": dtype, "token_ids": [list(t) for t in texts], "logps": logps}
    except DriftError as error:
        result = {"error": str(error)}
    write_json(out, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
