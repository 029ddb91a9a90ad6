"""Answers of a policy to the prompts of an evaluation, with any engine; what was drawn survives a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from drift_jax.config import RunConfig
from drift_jax.data.tokenizer import ChatTokenizer
from drift_jax.distributed import on_each, on_main
from drift_jax.errors import DataError
from drift_jax.manifest import Manifest
from drift_jax.models.architecture import load_hf_config
from drift_jax.records import Message
from drift_jax.sampling.base import Completion, SampleRequest, SamplingParams
from drift_jax.stages.engines import ENGINES
from drift_jax.stages.identity import sampling_job
from drift_jax.stages.inputs import open_tokenizer
from drift_jax.stages.journal import open_journals, read_completions
from drift_jax.stages.sample import completion_row, draw, known_cuts, merge, refuse_foreign


@dataclass(frozen=True)
class Answer:
    """`finish_reason` is `length` where the answer has no end within `sampling.max_new_tokens`."""

    text: str
    finish_reason: str


@dataclass(frozen=True)
class Answers:
    """By the prompts' ids, in their order; `prompts_cut` lost tokens of their beginning."""

    by_id: Mapping[str, Answer]
    prompts_cut: int


def answer_stage(
    config: RunConfig,
    model_dir: Path,
    dialogues: Mapping[str, Sequence[Message]],
    out_dir: Path,
    console: Console,
    what: str = "answering",
) -> Answers:
    """One answer to each dialogue, by `config.sampling`; of several hosts each draws its share where the engine can.

    A prompt of more than `sampling.max_input_length` tokens keeps its end.

    Raises:
      DataError: dialogues that the chat template refuses; all are named.
      StageError: `out_dir` holds answers of another policy, other prompts or another way of sampling.
    """
    tokenizer = on_each(lambda: open_tokenizer(model_dir, config.data.thinking))
    job = on_main(lambda: _job(config, model_dir, dialogues, out_dir))
    requests, cut = on_each(lambda: _requests(dialogues, tokenizer, config.sampling.max_input_length))
    engine = ENGINES[config.sampling.engine](config, model_dir)
    mine = requests[jax.process_index() :: jax.process_count()] if engine.per_host else requests
    params = SamplingParams.from_config(config.sampling, tokenizer.eos_ids, tokenizer.vocab_size)
    with on_each(lambda: open_journals(out_dir, jax.process_count() if engine.per_host else 1)) as journals:
        on_each(lambda: refuse_foreign(journals.rows.values(), job, out_dir))

        def keep(completions: list[Completion]) -> dict[str, str]:
            rows = [completion_row(c, tokenizer, False, job) for c in completions]
            journals.append(rows)
            return {"prompt": dialogues[rows[-1]["id"]][-1].content, "answer": rows[-1]["text"]}

        known = known_cuts(journals)
        missing = [r for r in mine if (r.row_id, r.sample) not in known]
        with engine.open(missing, out_dir, console) as sampler:
            draw(sampler, missing, params, keep, what, console, engine.per_host)
        merge(journals, list(dialogues), 1, out_dir)
    rows = on_main(lambda: read_completions(out_dir / "completions.jsonl"))
    return Answers({row["id"]: Answer(row["text"], row["finish_reason"]) for row in rows}, cut)


def _job(config: RunConfig, model_dir: Path, dialogues: Mapping[str, Sequence[Message]], out_dir: Path) -> str:
    plain = [[name, [[m.role, m.content] for m in messages]] for name, messages in dialogues.items()]
    prompts = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return sampling_job(config, {"prompts": prompts, "policy": Manifest(out_dir).model_hash(model_dir)}, model_dir)


def _requests(
    dialogues: Mapping[str, Sequence[Message]], tokenizer: ChatTokenizer, longest: int
) -> tuple[list[SampleRequest], int]:
    requests, refused, cut = list[SampleRequest](), list[str](), 0
    for name, messages in dialogues.items():
        try:
            ids = tokenizer.encode_chat(list(messages))
        except DataError as error:
            refused.append(f"  {name}: {error}")
            continue
        cut += len(ids) > longest
        requests.append(SampleRequest(name, 0, tuple(ids[-longest:])))
    if refused:
        raise DataError(f"{len(refused)} prompts cannot be encoded:\n" + "\n".join(refused[:20]))
    return requests, cut


def longest_context(model_dir: Path) -> int | None:
    """Tokens that a model was made for; None where its config.json does not say."""
    found = load_hf_config(model_dir).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None
