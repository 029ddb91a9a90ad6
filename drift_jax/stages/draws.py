"""What is drawn for one record: `sampling.n` completions for each prompt of the method, numbered all through."""

from __future__ import annotations

from drift_jax.config import RunConfig
from drift_jax.methods import Method, load_method


def method_of(config: RunConfig) -> Method:
    """Where both replies of a pair come from."""
    return load_method(config.recipe.method, config.sampling.style)


def samples_each(config: RunConfig) -> int:
    """Completions of a record over all its prompts. Sample i has its second draw as sample i plus this."""
    return config.sampling.n * len(method_of(config).draws)


def prompt_of(config: RunConfig, sample: int) -> int:
    """Which prompt of the method a sample was drawn by, second draws included."""
    return sample % samples_each(config) // config.sampling.n


def style_of(config: RunConfig, sample: int) -> str:
    """The style of that prompt."""
    return method_of(config).draws[prompt_of(config, sample)]


def needs_logps(config: RunConfig) -> bool:
    """Whether the mean log-prob of a completion is kept."""
    return config.sampling.chooser == "logprob" or (method_of(config).ranks and config.recipe.ranker == "logprob")
