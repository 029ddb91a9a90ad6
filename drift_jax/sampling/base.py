"""What every sampler takes and gives. Samplers and the trainer meet only in a Hugging Face directory."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from drift_jax.config import SamplingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The model's own generation_config never applies."""

    temperature: float  # 0 is greedy
    top_p: float
    top_k: int  # 0: off
    max_new_tokens: int
    seed: int
    eos_ids: tuple[int, ...]  # any of them ends a completion
    vocab_size: int  # ids from here on only pad the embedding table (Qwen) and are never drawn

    @staticmethod
    def from_config(config: SamplingConfig, eos_ids: Sequence[int], vocab_size: int) -> SamplingParams:
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            eos_ids=tuple(eos_ids),
            vocab_size=vocab_size,
        )


@dataclass(frozen=True)
class SampleRequest:
    """One completion to draw; (row_id, sample) names it and, with the seed, determines it."""

    row_id: str
    sample: int  # 0 .. n - 1
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What was drawn. With finish_reason `stop` the last id is the EOS id that ended it."""

    row_id: str
    sample: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    # Of each token, in nats, under the policy as it is: before temperature, top-k and top-p.
    token_logps: tuple[float, ...]


OnBatch = Callable[[list[Completion]], None]


class Sampler(abc.ABC):
    """Draws completions from one policy."""

    @abc.abstractmethod
    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, on_batch: OnBatch | None = None
    ) -> list[Completion]:
        """One completion per request, in the order of the requests.

        A completion depends on the policy, the parameters and (row_id, sample) only: not on the other requests.
        `on_batch` is called with every group of completions as soon as it is there.
        """
