"""Which mesh, accumulation and remat to try, in which order, and which of those that fit is the best.

A compilation of a 7B step takes the better part of a minute, so candidates are ordered by a rough count of memory and
time on paper, and few are compiled. What the compiler then says decides; the rough count is never shown.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from drift_jax.config import MeshConfig, RunConfig
from drift_jax.data.packing import Split, token_budget
from drift_jax.errors import ConfigError
from drift_jax.models.architecture import QwenConfig, qwen_config_from_hf
from drift_jax.plan.estimate import KERNEL_SHARE
from drift_jax.plan.flops import forward_flops
from drift_jax.plan.programs import PROGRAMS, PairLengths, sampling_layout_of
from drift_jax.plan.rows import GIB, Row, plan_row
from drift_jax.plan.slices import Slice

# From what keeps most to what keeps least of the forward pass.
_REMAT = ("dots", "layer", "offload")
_BYTES = {"float32": 4, "bfloat16": 2}
_MOST_TENSOR = 16
# Buffers of [tokens, mlp] in bfloat16 that the step holds at once besides what it keeps: 7B on v5e at 3072 and 6144
# tokens a chip.
_WIDE_BUFFERS = 24
# On paper a candidate may miss by so much before it is not worth a compilation.
_MARGIN = 1.3
_HOST_BYTES = 10e9  # bytes a second between a chip and its host's memory
# Tokens of a pair from which on a row may be cut over devices.
_LONG_ROW = 8192


class Mesh(NamedTuple):
    """Devices per axis."""

    data: int
    fsdp: int
    tensor: int
    sequence: int

    @property
    def rows(self) -> int:
        """Over how many devices rows are split."""
        return self.data * self.fsdp

    @property
    def weights(self) -> int:
        """Over how many devices weights are split."""
        return self.fsdp * self.tensor * self.sequence

    def apply(self, config: MeshConfig) -> MeshConfig:
        """With the table of these axes; rules of the user stay."""
        return dataclasses.replace(config, **self._asdict(), strategy="auto")


@dataclass(frozen=True)
class Candidate:
    """A choice, and the rough count of it."""

    mesh: Mesh
    accumulation_steps: int
    remat: str
    gib: float
    seconds: float

    def apply(self, config: RunConfig) -> RunConfig:
        return dataclasses.replace(
            config,
            mesh=self.mesh.apply(config.mesh),
            train=dataclasses.replace(config.train, accumulation_steps=self.accumulation_steps),
            model=dataclasses.replace(config.model, remat=self.remat),
        )


class Choice(NamedTuple):
    """What a search found."""

    rows: list[Row]  # compiled ones, in the order in which they were tried
    best: Row | None
    config: RunConfig | None  # with the best one's keys
    why: str


def search(
    config: RunConfig,
    architecture: dict[str, Any],
    where: Slice,
    max_compiles: int,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Choice:
    """Compiles train steps until `max_compiles`, then the other two programs of the fastest that fits.

    Raises:
      ConfigError: no mesh divides the devices, the model and the batch, or `sampling.batch_size` cannot be split.
    """
    model = qwen_config_from_hf(architecture, config.model.path)
    sampling_layout_of(config, model, where)
    candidates = list_candidates(config, model, where)
    if not candidates:
        raise ConfigError(
            f"no mesh over {len(where.devices)} devices divides the model's dims and train.batch_size "
            f"({config.train.batch_size}). Raise it to a multiple of the devices, or take a smaller slice."
        )
    tried: list[tuple[Candidate, Row]] = []
    for _ in range(max_compiles):
        left = [c for c in candidates if not any(c == done or _settles(done, row, c) for done, row in tried)]
        if not left:
            break
        row = plan_row(left[0].apply(config), architecture, where, names=("train",))
        tried.append((left[0], row))
        on_row(row)
    return _choose(config, architecture, where, tried, on_row)


def _choose(
    config: RunConfig,
    architecture: dict[str, Any],
    where: Slice,
    tried: list[tuple[Candidate, Row]],
    on_row: Callable[[Row], None],
) -> Choice:
    rows = [row for _, row in tried]
    fitting = [i for i, row in enumerate(rows) if row.fits]
    for i in sorted(fitting, key=lambda i: rows[i].estimated_step_s or float("inf")):
        chosen = tried[i][0].apply(config)
        rest = plan_row(chosen, architecture, where, names=[name for name in PROGRAMS if name != "train"])
        on_row(rest)
        rows[i] = _merge(rows[i], rest)
        if rows[i].fits:
            return Choice(rows, rows[i], chosen, _explain(rows, rows[i]))
    need = min((row.hbm_gib_per_chip for row in rows if row.hbm_gib_per_chip), default=None)
    least = f"; the smallest needs {need:.2f} GiB per chip" if need else ""
    return Choice(
        rows,
        None,
        None,
        f"none of {len(rows)} compiled choices fits{least}. Take more chips, train.gradient_dtype=bfloat16, "
        "train.moment_dtype=bfloat16, or a shorter data.max_length.",
    )


def _merge(row: Row, rest: Row) -> Row:
    programs = row.programs | rest.programs
    return dataclasses.replace(
        row,
        fits=rest.fits,
        programs=programs,
        hbm_gib_per_chip=max(programs.values(), default=None),
        compile_s=row.compile_s + rest.compile_s,
        note=rest.note,
    )


def _explain(rows: list[Row], best: Row) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in best.mesh.items() if size > 1) or "one device"
    others = [row for row in rows if row.fits and row is not best and row.estimated_step_s]
    sentence = (
        f"best: {mesh}, accumulation_steps {best.accumulation_steps}, remat {best.remat}: an estimated "
        f"{best.estimated_step_s:.3g} s an update"
    )
    if others:
        second = min(others, key=lambda row: row.estimated_step_s or 0.0)
        sentence += f", the least of {len(others) + 1} that fit (the next takes {second.estimated_step_s:.3g} s)"
    else:
        sentence += f", the only one of {len(rows)} compiled that fits"
    return f"{sentence}; {best.hbm_gib_per_chip:.2f} of {best.limit_gib:.2f} GiB per chip."


def _settles(done: Candidate, row: Row, other: Candidate) -> bool:
    """Whether a compiled candidate makes another one of its mesh pointless.

    Where one fits, nothing is wanted that is no faster on paper; where one does not, nothing that saves less memory
    will.
    """
    if done.mesh != other.mesh:
        return False
    if row.fits:
        return other.seconds >= done.seconds
    fewer = other.accumulation_steps <= done.accumulation_steps
    return fewer and _REMAT.index(other.remat) <= _REMAT.index(done.remat)


def list_candidates(config: RunConfig, model: QwenConfig, where: Slice) -> list[Candidate]:
    """Choices that can be split and may fit on paper, the fastest on paper first."""
    limit = where.chip.limit_gib or float("inf")
    found: dict[tuple[Mesh, int, str], Candidate] = {}
    for mesh, steps, remat in itertools.product(_meshes(config, model, where), _accumulations(config), _REMAT):
        micro = config.train.batch_size // steps
        if micro % mesh.rows:
            continue
        if remat == "offload" and where.chip.clock_hz is None:
            continue  # fake devices have no host memory of their own
        tokens = _tokens_per_device(config, micro // mesh.rows, Split(mesh.rows, mesh.sequence))
        gib = _count_gib(config, model, mesh, tokens, remat)
        if gib <= _MARGIN * limit:
            seconds = _count_seconds(config, model, mesh, tokens, remat, where)
            # With as many tokens at a time it is the same program: the fewest steps stand for all.
            found.setdefault((mesh, tokens, remat), Candidate(mesh, steps, remat, gib, seconds))
    # What is over the limit on paper is tried after what is below it.
    return sorted(found.values(), key=lambda c: (c.gib > limit, c.seconds, c.gib))


def _meshes(config: RunConfig, model: QwenConfig, where: Slice) -> Iterator[Mesh]:
    """Over all devices. Rows are cut (`sequence`) only where they are long, or fewer than the devices."""
    devices = len(where.devices)
    cut_rows = PairLengths.of(config).longest >= _LONG_ROW or config.train.batch_size < devices
    for tensor, sequence in itertools.product(
        _powers_of_two(min(devices, _MOST_TENSOR)), _powers_of_two(devices if cut_rows else 1)
    ):
        if devices % (tensor * sequence) or model.heads % tensor or model.mlp % tensor:
            continue
        for data in _powers_of_two(devices // tensor // sequence):
            fsdp = devices // tensor // sequence // data
            mesh = Mesh(data, fsdp, tensor, sequence)
            if devices % (data * tensor * sequence) or model.embed % (fsdp * sequence):
                continue
            yield mesh


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _accumulations(config: RunConfig) -> list[int]:
    """Powers of two that divide the batch; with a token budget of its own, accumulation changes nothing."""
    if config.train.tokens_per_device:
        return [config.train.accumulation_steps]
    return [steps for steps in _powers_of_two(config.train.batch_size) if config.train.batch_size % steps == 0]


def _tokens_per_device(config: RunConfig, pairs: int, split: Split) -> int:
    """As the loader's budget; `pairs` of the devices that share the tokens of rows."""
    return config.train.tokens_per_device or token_budget(PairLengths.of(config).longest, pairs, split) // split.tokens


def _count_gib(config: RunConfig, model: QwenConfig, mesh: Mesh, tokens: int, remat: str) -> float:
    train, tensor = config.train, mesh.tensor
    moments = _BYTES[train.moment_dtype] * (2 if train.optimizer == "adamw" else 1)
    state = model.num_parameters * (_BYTES[train.master_dtype] + moments + _BYTES[train.gradient_dtype])
    width = _BYTES[config.model.compute_dtype]
    kept = 0 if remat == "offload" else _count_kept(model, tensor, remat)
    layer = (model.num_parameters - 2 * model.vocab_size * model.embed) // model.layers
    working = tokens * _WIDE_BUFFERS * model.mlp * 2 // tensor + 3 * 2 * layer // tensor
    return (state / mesh.weights + model.layers * tokens * kept * width + working) / GIB


def _count_kept(model: QwenConfig, tensor: int, remat: str) -> int:
    """Numbers that a layer keeps of a token."""
    heads = model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return 3 * model.embed + (heads + 3 * model.mlp) // tensor if remat == "dots" else model.embed


def _count_seconds(config: RunConfig, model: QwenConfig, mesh: Mesh, tokens: int, remat: str, where: Slice) -> float:
    data, _, tensor, sequence = mesh
    chip, lengths = where.chip, PairLengths.of(config)
    flops = 3 * config.train.batch_size * forward_flops(model, lengths.prompt, lengths.completion, lengths.completion)
    again = 1.0 if remat == "dots" else 4 / 3
    compute = again * flops / len(where.devices) / (KERNEL_SHARE * chip.peak_flops)
    micro_batches = config.train.batch_size * lengths.longest / (tokens * sequence * mesh.rows)
    ring = 2 * chip.link_bytes
    # Weights forward and again backward, gradients back; over `data` the gradients of every micro-batch meet.
    shared = mesh.fsdp * sequence
    weights = 3 * 2 * model.num_parameters / tensor * (shared - 1) / shared / ring
    gradients = 2 * 4 * model.num_parameters / mesh.weights * (data - 1) / data / ring
    # Two sums of activations a layer forward, two backward, and those that are made again.
    sums = 4 if remat == "dots" else 6
    activations = sums * model.layers * 2 * tokens * model.embed * 2 * (tensor - 1) / tensor / ring
    # Keys and values of whole rows forward, again backward, and their gradients.
    heads = 2 * model.kv_heads * model.head_dim / min(tensor, model.kv_heads)
    rows = 3 * model.layers * tokens * heads * 2 * (sequence - 1) / ring
    host = 2 * model.layers * tokens * _count_kept(model, tensor, remat) * 2 / _HOST_BYTES * (remat == "offload")
    return max(compute, micro_batches * weights) + micro_batches * (gradients + activations + rows + host)
