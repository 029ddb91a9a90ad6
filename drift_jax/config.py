"""The configuration of a run: frozen dataclasses, read from YAML, with `a.b=c` overrides.

One key has one meaning; its unit stands in its comment. An unknown key, a wrong type or an impossible value
is a `ConfigError` that names every offending key at once. The set of keys is a contract with users: a test
freezes it, and a change needs a line in CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from drift_jax.credentials import ServerArguments, ServerEnvironment, ServerUrl, VariableName
from drift_jax.errors import ConfigError
from drift_jax.key_problems import describe_keys
from drift_jax.methods import DEFAULT, load_method, method_names
from drift_jax.path_keys import expand_home, path_problems
from drift_jax.presets import apply_preset
from drift_jax.yaml_files import on_one_line, parse_yaml, read_yaml

_FORBID_EXTRA = ConfigDict(extra="forbid")

_HOTTEST = 2.0  # of a vLLM server
_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")  # MODULE:FUNCTION
DType = Literal["float32", "bfloat16"]
PositiveInt = Annotated[int, Field(ge=1, description="an integer of at least 1")]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]  # at 1 a moment never sees a gradient


@dataclass(frozen=True)
class ModelConfig:
    """The policy that the run starts from."""

    __pydantic_config__ = _FORBID_EXTRA

    path: str  # a Hugging Face model directory, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct
    revision: str | None = None  # branch, tag or commit when `path` is a hub id
    compute_dtype: DType = "bfloat16"  # activations and matmuls
    remat: Literal["none", "dots", "layer", "offload"] = "layer"  # what the backward pass computes again
    scan_layers: bool | None = None  # one program for all layers; null: not on one GPU with remat none or dots
    attention: Literal["auto", "xla", "splash", "triton"] = "auto"  # the back end; auto: by device, see `drift doctor`
    pad_embedding: Literal["trained", "frozen"] = "trained"  # see `drift presets`; the preset gives the default


@dataclass(frozen=True)
class DataConfig:
    """Which records, and how they become tokens."""

    __pydantic_config__ = _FORBID_EXTRA

    dsat: str = ""  # JSONL of DSAT records
    sat: str = ""  # JSONL of SAT records, for methods that take logged replies which users were happy with
    seed_train: str | None = None  # JSONL of seed pairs (DSAT -> SAT); null: the run has no seed stage
    seed_test: str | None = None  # JSONL of held-out seed pairs
    test_rows: NonNegativeInt = 100  # the first rows of these are held out, unshuffled (recipe of the authors)
    max_rows: PositiveInt | None = None  # use at most this many training rows of them; null: all
    max_length: PositiveInt = 2048  # tokens of prompt + completion
    max_prompt_length: PositiveInt = 1024  # tokens of the prompt, where `truncation` looks at it
    # How text becomes ids, how a completion ends, what is cut: see `drift presets`; the preset gives the defaults.
    template: Literal["generation_prompt", "handbook", "full_render", "reply_text"] = "generation_prompt"
    eos: Literal["turn_end", "append_if_missing", "append", "as_rendered"] = "turn_end"
    truncation: Literal[
        "keep_prompt_end", "trl<=0.11", "trl<=0.11 keep_start", "trl0.12", "trl0.12.0-0.12.2", "keep_start"
    ] = "keep_prompt_end"
    thinking: Literal["none", "template"] = "none"  # before a reply, where the template knows of it (Qwen3)
    on_bad_row: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class RecipeConfig:
    """The loop over iterations."""

    __pydantic_config__ = _FORBID_EXTRA

    method: str = DEFAULT  # where both replies of a pair come from: a file of drift_jax/methods/
    ranker: str = "logprob"  # of two drawn replies: logprob, judge, or MODULE:FUNCTION of (record, reply) -> score
    iterations: NonNegativeInt = 2  # K
    reference: Literal["previous", "initial"] = "previous"  # previous: policy_{k-1}; initial: `model.path`
    seed_epochs: PositiveFloat = 3  # epochs over the seed pairs; an iteration takes `train.epochs`
    showcase_prompts: tuple[str, ...] = ()  # answered greedily before and after, shown at the end


@dataclass(frozen=True)
class SamplingConfig:
    """How the chosen responses are sampled from the current policy."""

    __pydantic_config__ = _FORBID_EXTRA

    engine: Literal["local", "vllm"] = "local"  # the JAX sampler, or vLLM servers (section `vllm`)
    style: Literal["chat", "complaint", "paper", "unguided"] = "chat"
    temperature: NonNegativeFloat = 0.7  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: NonNegativeInt = 0  # 0: off
    n: PositiveInt = 1  # completions per prompt; of those that the rules below let pass, `chooser` picks one
    chooser: Literal["first", "longest_within", "logprob", "judge"] = "first"  # logprob: highest mean, in nats a token
    longest_within: PositiveInt = 512  # tokens; chooser longest_within takes the longest completion of at most these
    on_cut: Literal["keep", "drop", "resample"] = "keep"  # of max_new_tokens without an end; resample: once, then drop
    max_similarity: Share = 0.95  # to the rejected response, in characters; above it dropped; 1: only equal ones
    max_repetition: Share = 0.3  # of a completion in one phrase said again and again; above it dropped; 1: off
    other_speakers: Literal["drop", "keep"] = "drop"  # completions that go on as "User:" or the like
    same_language: bool = False  # drop completions in another language than the user's; extra `language`
    max_new_tokens: PositiveInt = 512
    max_input_length: PositiveInt = 2048  # tokens; a longer sampling prompt keeps its END
    batch_size: PositiveInt | None = 16  # rows decoded together; null: what memory has room for, at most 256
    tensor_parallel: PositiveInt | None = None  # devices that share a layer; null: as many as kv heads and MLP allow
    per_host: bool | None = None  # each host samples its share with a whole policy; null: where one fits a host
    compute_dtype: DType = "bfloat16"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible server that compares completions (chooser or ranker `judge`)."""

    __pydantic_config__ = _FORBID_EXTRA

    base_url: ServerUrl = ""  # with its /v1, such as http://127.0.0.1:8000/v1
    model: str = ""  # as the server names it
    api_key_env: VariableName = ""  # the environment variable with the API key; empty: the server asks for none
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 512  # of a verdict
    timeout_s: PositiveFloat = 120.0  # seconds for a verdict; one that fails is asked for five times
    concurrency: PositiveInt = 8  # verdicts asked for at a time
    price_prompt: NonNegativeFloat = 0.0  # dollars for a million tokens of prompts; 0: costs are not counted
    price_completion: NonNegativeFloat = 0.0  # dollars for a million tokens of verdicts


@dataclass(frozen=True)
class VllmConfig:
    """The servers of `sampling.engine: vllm`: running ones, or one that each host starts."""

    __pydantic_config__ = _FORBID_EXTRA

    base_urls: tuple[ServerUrl, ...] = ()  # running servers, such as http://10.0.0.2:8000/v1; empty: one is started
    api_key_env: VariableName = ""  # the environment variable with their API key; empty: they ask for none
    served_name: str | None = None  # their name of the model; null: of the one that they serve
    refresh: Literal["auto", "shared", "restart"] = "auto"  # who loads new weights in place: see the README
    python: str | None = None  # interpreter of the environment that has vLLM; null: the one of this command
    device: Literal["auto", "cuda", "tpu", "cpu"] = "auto"  # which build of vLLM that is; auto: what the host has
    port: Annotated[int, Field(ge=1, le=65535)] | None = None  # on 127.0.0.1; null: a free one
    max_model_len: PositiveInt | None = None  # tokens; null: sampling.max_input_length + max_new_tokens
    tensor_parallel: PositiveInt | None = None  # accelerators a model is split over; null: as many as the host has
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of an accelerator's memory
    args: ServerArguments = ()  # further arguments of `vllm serve`
    env: ServerEnvironment = field(default_factory=dict)  # further environment variables of it
    start_timeout_s: PositiveFloat = 1800  # seconds until it must answer
    request_timeout_s: PositiveFloat = 600  # seconds that one completion may take
    concurrency: PositiveInt = 64  # completions in flight per server


@dataclass(frozen=True)
class TrainConfig:
    """One DPO stage. The defaults are those of the published DRIFT configs."""

    __pydantic_config__ = _FORBID_EXTRA

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    rpo_alpha: NonNegativeFloat = 0.001  # weight of the NLL of the chosen responses
    # The NLL's tokens and their mean: see `drift presets`; the preset gives the defaults.
    nll_reduction: Literal["global_token_mean", "group_token_mean", "sequence_mean"] = "global_token_mean"
    nll_tokens: Literal["all", "nonzero"] = "all"
    group_size: PositiveInt = 4  # pairs that TRL has on one device at a time; where a choice looks at groups of pairs
    epochs: PositiveFloat = 1
    max_steps: PositiveInt | None = None  # stop after this many updates; null: by `epochs`
    batch_size: PositiveInt = 32  # pairs per update, over all devices and accumulation steps
    accumulation_steps: PositiveInt = 1  # micro-batches that would make an update if all its pairs were the longest
    tokens_per_device: PositiveInt | None = None  # budget of a packed micro-batch; null: by accumulation_steps
    eval_batch_size: PositiveInt | None = None  # held-out pairs per forward; null: the micro-batch
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    learning_rate: PositiveFloat = 5e-7
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Share = 0.1  # share of all updates; rounded up
    warmup_steps: PositiveInt | None = None  # updates; replaces warmup_ratio
    max_grad_norm: PositiveFloat = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # of an update whose gradient is not finite; skip: left out, counted
    weight_decay: NonNegativeFloat = 0.0  # not applied to biases and norms
    adam_beta1: DecayRate = 0.9
    adam_beta2: DecayRate = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    rmsprop_decay: DecayRate = 0.99
    rmsprop_epsilon: PositiveFloat = 1e-8
    master_dtype: DType = "float32"  # of the weights; bfloat16: updates are rounded stochastically
    gradient_dtype: DType = "float32"  # in which gradients are summed and kept; bfloat16: half of their memory
    moment_dtype: DType = "float32"  # of the optimizer's moments; bfloat16: rounded stochastically
    eval_every: PositiveInt | Literal["epoch"] | None = None  # updates between evaluations; null: after the last only
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42  # order of the pairs, and of stochastic rounding
    reference_cache: str | None = None  # a directory where runs share reference log-probs; null: each makes its own


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis, one of which may be -1: whatever is left; and which dims of arrays they split."""

    __pydantic_config__ = _FORBID_EXTRA

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    strategy: str = "auto"  # the table of rules, see `drift mesh`; auto: that of the axes with several devices
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict)  # dim: axes that split it, instead of the table's


@dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints inside a training stage."""

    __pydantic_config__ = _FORBID_EXTRA

    # Updates between saves, or every epoch, or only at the end; the last update is always saved.
    every_steps: PositiveInt | Literal["epoch", "end"] = 100
    every_minutes: PositiveFloat | None = 30  # minutes after which one is saved besides; null: by updates only
    keep: PositiveInt = 2  # newest checkpoints kept


@dataclass(frozen=True)
class ExportConfig:
    """The Hugging Face directory a stage leaves behind."""

    __pydantic_config__ = _FORBID_EXTRA

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_shard_gib: PositiveFloat = 4.0  # GiB per safetensors file


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    __pydantic_config__ = _FORBID_EXTRA

    log_every: PositiveInt = 1  # updates between lines of metrics.jsonl
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "drift_jax"  # W&B project


@dataclass(frozen=True)
class TheoryConfig:
    """What Lemma 1 speaks of, measured while a stage trains (`drift_jax/theory.py`); nothing of it changes a result."""

    __pydantic_config__ = _FORBID_EXTRA

    every: PositiveInt | Literal["epoch", "end"] | None = None  # updates between measurements; null: off, at no cost
    pairs: PositiveInt = 16  # training pairs that are measured, the same ones all along
    tau: Annotated[float, Field(gt=0, le=1)] = 0.25  # the least sigma(-s) of pairs that still push


@dataclass(frozen=True)
class RunConfig:
    """Everything `drift run` needs."""

    __pydantic_config__ = _FORBID_EXTRA

    run_dir: Annotated[str, Field(min_length=1)]
    model: ModelConfig
    preset: Literal["drift", "paper", "trl1"] = "drift"  # whose way of making tokens and losses: `drift presets`
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    theory: TheoryConfig = field(default_factory=TheoryConfig)


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `a.b=c` overrides, whose right side is YAML too.

    Raises:
      ConfigError: the file is missing or not YAML, or a key is unknown, of the wrong type or impossible.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return build_config(raw, source=str(path))


def merge_configs(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Plain values of two configs, key by key; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge_configs(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def build_config(raw: dict[str, Any], source: str = "config") -> RunConfig:
    """Plain values -> validated `RunConfig`.

    Raises:
      ConfigError: naming every offending key at once.
    """
    raw = expand_home(apply_preset(raw))
    try:
        # JSON mode: strict types (no "2048" for 2048) while mappings still become dataclasses.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n" + "\n".join(describe_keys(error, _SECTIONS, config_keys()))) from None
    check_config(config)
    return config


def check_config(config: RunConfig) -> None:
    """Checks what spans several keys. Raises `ConfigError` with both numbers and the remedy."""
    problems = []
    data, train, mesh = config.data, config.train, config.mesh
    if data.truncation != "keep_start" and data.max_prompt_length >= data.max_length:
        problems.append(
            f"data.max_prompt_length ({data.max_prompt_length}) must be below data.max_length "
            f"({data.max_length}): no token would be left for a completion. Lower the first or raise the second."
        )
    if train.batch_size % train.accumulation_steps:
        fitting = train.accumulation_steps * max(1, train.batch_size // train.accumulation_steps)
        problems.append(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.accumulation_steps "
            f"({train.accumulation_steps}). A batch of {fitting} would do."
        )
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor", "sequence")}
    if sum(size == -1 for size in sizes.values()) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        problems.append(f"mesh sizes must be positive and at most one of them -1 (what is left), found {sizes}.")
    sampling = config.sampling
    if sampling.chooser != "first" and sampling.n == 1:
        problems.append(
            f"sampling.chooser ({sampling.chooser}) picks one of sampling.n (1) completions: raise sampling.n to 2 or "
            "more, or leave the chooser at first."
        )
    if sampling.chooser == "judge" and not (config.judge.base_url and config.judge.model):
        problems.append("sampling.chooser is judge: name its server and model in judge.base_url and judge.model.")
    problems += _method_problems(config) + path_problems(dataclasses.asdict(config))
    needed = config.sampling.max_input_length + config.sampling.max_new_tokens
    if config.vllm.max_model_len is not None and config.vllm.max_model_len < needed:
        problems.append(
            f"vllm.max_model_len ({config.vllm.max_model_len}) is less than sampling.max_input_length + max_new_tokens "
            f"({needed}): a long prompt would be refused. Raise it, or leave it out."
        )
    if config.sampling.engine == "vllm" and config.sampling.temperature > _HOTTEST:
        problems.append(
            f"sampling.temperature ({config.sampling.temperature}) is more than the {_HOTTEST} that vLLM takes. Lower "
            "it, or set sampling.engine to local."
        )
    addresses = [("vllm.base_urls", url) for url in config.vllm.base_urls]
    if config.judge.base_url:
        addresses.append(("judge.base_url", config.judge.base_url))
    problems += [
        f"{key}: {url!r} is no address of a server; write it as http://HOST:8000/v1."
        for key, url in addresses
        if not url.startswith(("http://", "https://"))
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _method_problems(config: RunConfig) -> list[str]:
    recipe, judge = config.recipe, config.judge
    if recipe.method not in method_names():
        return [f"recipe.method must be one of {', '.join(method_names())}, found {recipe.method!r}."]
    problems, method = [], load_method(recipe.method, config.sampling.style)
    if config.sampling.chooser == "judge" and method.records == "sat":
        problems.append(
            f"sampling.chooser is judge, whose question shows a complaint; the records of method {recipe.method} have "
            "none. Take another chooser."
        )
    if recipe.ranker not in ("logprob", "judge") and not _FUNCTION.fullmatch(recipe.ranker):
        problems.append(f"recipe.ranker must be logprob, judge or MODULE:FUNCTION, found {recipe.ranker!r}.")
    if method.ranks and recipe.ranker == "judge" and not (judge.base_url and judge.model):
        problems.append("recipe.ranker is judge: name its server and model in judge.base_url and judge.model.")
    return problems


def config_to_yaml(config: RunConfig) -> str:
    """The whole resolved config, every key written out; `load_config` reads it back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def config_keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """Every leaf key, dotted, in the order of declaration."""
    keys: list[str] = []
    for f in dataclasses.fields(cls):
        section = _SECTIONS.get(f.name) if not prefix else None
        keys += config_keys(section, f"{f.name}.") if section else [prefix + f.name]
    return keys


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "recipe": RecipeConfig,
    "sampling": SamplingConfig,
    "judge": JudgeConfig,
    "vllm": VllmConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "export": ExportConfig,
    "tracking": TrackingConfig,
    "theory": TheoryConfig,
}


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one `a.b=c` in plain nested values; the right side is YAML. Raises `ConfigError` for other forms."""
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"--set takes KEY=VALUE such as train.beta=0.2, found {override!r}.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r:.80} is not a YAML value: {on_one_line(error)}.") from None
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {section!r} is not a section of the config.")
    node[leaf] = value
