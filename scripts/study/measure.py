"""What a policy does with questions it was not trained on and without any complaint.

satisfied         share of replies that meet every wish of the user (`user.py`); and the share for each wish alone
words             mean length, of replies that may be cut at `sampling.max_new_tokens`
distinct_1, _2    different n-grams of all n-grams, in the first `_WORDS` words of all replies of a draw: of a fixed
                  number, since the share falls with length whatever is said
self_similarity   of two replies to the same question, 0 to 1, as `sampling.max_similarity` measures it
kl                nats a reply: over its tokens the sum of KL(policy || base) of the next token, exactly, along replies
                  as they are drawn (so of the policy at its sampling temperature, not of the policy's own distribution)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from study.logs import Prompt
from study.user import WISHES, is_satisfied

from drift_jax.config import RunConfig
from drift_jax.data.chosen import similarity
from drift_jax.files import write_json
from drift_jax.journal import read_rows
from drift_jax.models.policy import Policy, bind
from drift_jax.progress import stage_progress
from drift_jax.records import Message
from drift_jax.sharding import build_layout, use_layout
from drift_jax.stages.answer import answer_stage
from drift_jax.stages.inputs import open_policy, open_tokenizer

SAMPLES = 2  # replies to a question
SEED = 1000
_WORDS = 20
_ROWS = 8  # replies whose logits are in memory at a time
_KL_PROMPTS = 12  # questions whose first replies are compared with the base model
_LENGTHS = 32  # rows are padded to a multiple of it, so that few programs are compiled


def measure(
    config: RunConfig,
    model_dir: Path,
    base_dir: Path,
    prompts: Sequence[Prompt],
    seed: int,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Draws replies, and writes what is found to `out/measured.json`; read from there when it exists.

    Returns:
      `per_prompt`: metric -> a number for each prompt, the mean over its samples (`kl`: for some of the prompts);
      `draws`: metric -> a number for each draw of a reply to every prompt; `replies`: prompt id -> texts.
    """
    path = out / "measured.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    dialogues = {f"{row['id']}#{i}": [Message("user", row["prompt"])] for row in prompts for i in range(SAMPLES)}
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, seed=SEED + seed))
    found = answer_stage(config, model_dir, dialogues, out, console, "held-out replies").by_id
    texts = {row["id"]: [found[f"{row['id']}#{i}"].text for i in range(SAMPLES)] for row in prompts}
    kl = _kl(config, model_dir, base_dir, prompts, out, console)
    measured = {
        "per_prompt": {
            name: [values[row["id"]] for row in prompts] for name, values in _of_prompts(prompts, texts).items()
        }
        | {"kl": kl},
        "draws": _of_draws(list(texts.values())),
        "replies": texts,
    }
    write_json(path, measured)
    return measured


def _of_prompts(prompts: Sequence[Prompt], texts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    def mean(value: Any) -> dict[str, float]:
        return {row["id"]: float(np.mean([value(row, text) for text in texts[row["id"]]])) for row in prompts}

    found = {"satisfied": mean(lambda row, text: is_satisfied(row["prompt"], text))}
    for name, wish in WISHES.items():
        found[name] = mean(lambda row, text, wish=wish: wish.is_met(row["prompt"], text))
    found["words"] = mean(lambda _, text: len(text.split()))
    found["self_similarity"] = {name: similarity(*replies) for name, replies in texts.items()}
    return found


def _of_draws(texts: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """One number for each draw."""
    draws = [[replies[i].lower().split()[:_WORDS] for replies in texts] for i in range(SAMPLES)]
    return {f"distinct_{n}": [_distinct(draw, n) for draw in draws] for n in (1, 2)}


def _distinct(replies: Sequence[Sequence[str]], n: int) -> float:
    grams = [tuple(words[i : i + n]) for words in replies for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _kl(
    config: RunConfig, model_dir: Path, base_dir: Path, prompts: Sequence[Prompt], out: Path, console: Console
) -> list[float]:
    """Of the first reply to each of some prompts, nats."""
    prompts = prompts[:: len(prompts) // _KL_PROMPTS or 1]
    if model_dir == base_dir:
        return [0.0] * len(prompts)
    tokenizer = open_tokenizer(base_dir, config.data.thinking)
    drawn = {row["id"]: row["token_ids"] for row in read_rows(out / "completions.jsonl")}
    asked = [tokenizer.encode_chat([Message("user", row["prompt"])]) for row in prompts]
    replies = [drawn[f"{row['id']}#0"] for row in prompts]
    dtype, layout = config.sampling.compute_dtype, build_layout(config.mesh)
    policy, base = (open_policy(path, layout, dtype, dtype, console) for path in (model_dir, base_dir))
    order = sorted(range(len(prompts)), key=lambda i: len(asked[i]) + len(replies[i]))
    found = np.zeros(len(prompts))
    with stage_progress("KL to the base model", len(prompts), "replies", console=console) as bar:
        for start in range(0, len(order), _ROWS):
            rows = order[start : start + _ROWS]
            ids, mask = pad_rows([asked[i] for i in rows], [replies[i] for i in rows])
            found[rows] = reply_kl(policy, base, ids, mask)[: len(rows)]
            bar.advance(len(rows))
    return found.tolist()


def pad_rows(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> tuple[Int[np.ndarray, "R T"], Bool[np.ndarray, "R T"]]:
    """(ids, places whose next token belongs to the reply), padded on the right to `_ROWS` rows of few lengths."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
    ids = np.zeros((_ROWS, -(-longest // _LENGTHS) * _LENGTHS), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids[row, : len(prompt) + len(reply)] = [*prompt, *reply]
        mask[row, len(prompt) - 1 : len(prompt) + len(reply) - 1] = True
    return ids, mask


def reply_kl(
    policy: Policy, base: Policy, ids: Int[np.ndarray, "R T"], mask: Bool[np.ndarray, "R T"]
) -> Float[np.ndarray, " R"]:
    """Sum over the marked places of KL(policy || base) of the next token, nats."""
    with use_layout(policy.layout):
        return np.asarray(_summed_kl(policy.graphdef, policy.params, base.params, ids, mask))


@partial(jax.jit, static_argnums=0)
def _summed_kl(
    graphdef: Any, policy: Any, base: Any, ids: Int[Array, "R T"], mask: Bool[Array, "R T"]
) -> Float[Array, " R"]:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = [bind(graphdef, params).hidden(ids, positions) for params in (policy, base)]

    def of_row(row: tuple[Array, Array, Array]) -> Array:
        ours, theirs = (
            jax.nn.log_softmax(bind(graphdef, params).logits(x)) for params, x in ((policy, row[0]), (base, row[1]))
        )
        return jnp.where(row[2], (jnp.exp(ours) * (ours - theirs)).sum(axis=-1), 0.0).sum()

    return jax.lax.map(of_row, (*hidden, mask))  # logits of one row at a time
