"""What a compiled step must not send (three rules), read from its text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from drift_jax.plan.collectives import Collective, find_collectives
from drift_jax.plan.hlo import Program, Shape
from drift_jax.plan.programs import Programs


class Sizes(NamedTuple):
    """By which the arrays of a step are known."""

    layers: int
    embed: int
    vocab: int
    lengths: tuple[int, ...]  # of rows, and of lists of completion tokens
    params: tuple[tuple[int, ...], ...]  # matrices of a layer, or of the whole model
    devices: int
    tensor: int  # into how many parts the mesh splits heads, mlp and vocabulary

    @staticmethod
    def of(programs: Programs) -> Sizes:
        model, batch, mesh = programs.architecture, programs.batch, programs.mesh_sizes
        shapes = [leaf.shape for leaf in jax.tree.leaves(programs.trainer.abstract_state.params)]
        params = {shape[1:] if shape[0] == model.layers else shape for shape in shapes}
        matrices = tuple(shape for shape in sorted(params) if model.embed in shape and len(shape) > 1)
        lengths = tuple({batch.ids.shape[2], batch.owners.shape[2]})
        devices, tensor = math.prod(mesh.values()), mesh.get("tensor", 1)
        return Sizes(model.layers, model.embed, model.vocab_size, lengths, matrices, devices, tensor)


def find_faults(program: Program, mesh: Mapping[str, int], sizes: Sizes) -> list[str]:
    """Sentences about collectives that should not be there."""
    collectives = [c for c in find_collectives(program, mesh) if c.axes]
    return [
        f"{rule}: {c.kind} {c.name} of {[shape.dims for shape in c.shapes]} along {c.axis}, {c.op_name}"
        for rule, found in (
            ("pair halves are permuted", _permuted_rows(collectives, sizes)),
            ("logits are gathered", _gathered_logits(collectives, sizes)),
            ("a whole parameter is gathered outside the layers' loop", _gathered_params(collectives, sizes)),
        )
        for c in found
    ]


def _permuted_rows(collectives: Iterable[Collective], sizes: Sizes) -> list[Collective]:
    """Hidden states of tokens that go to another device as they are; ids, which are few bytes, may."""

    def is_hidden(shape: Shape) -> bool:
        return bool(set(shape.dims) & set(sizes.lengths)) and shape.dtype[0] in "bf"

    permutes = [c for c in collectives if c.kind == "collective-permute"]
    return [c for c in permutes if any(map(is_hidden, c.shapes))]


def _gathered_logits(collectives: Iterable[Collective], sizes: Sizes) -> list[Collective]:
    """The vocabulary, or a part of it, beside something that is not the model's width or a part of that."""

    def is_logits(shape: Shape) -> bool:
        words, width = (_parts_of(size, sizes.devices) for size in (sizes.vocab, sizes.embed))
        others = [dim for dim in shape.dims if dim not in words and dim > 1]
        return len(others) < len([dim for dim in shape.dims if dim > 1]) and bool(others) and not width & set(others)

    gathers = [c for c in collectives if c.kind == "all-gather"]
    return [c for c in gathers if any(map(is_logits, c.shapes))]


def _gathered_params(collectives: Iterable[Collective], sizes: Sizes) -> list[Collective]:
    """All that `fsdp` splits of a parameter, of one layer or of all layers; heads and head_dim may be one dim."""
    rows = {math.prod(shape) // sizes.embed // tensor for shape in sizes.params for tensor in {1, sizes.tensor}}

    def is_whole(shape: Shape) -> bool:
        size = math.prod(shape.dims)
        return sizes.embed in shape.dims and bool({size // sizes.embed, size // sizes.embed // sizes.layers} & rows)

    def in_layers(c: Collective) -> bool:
        return any(region.is_loop and region.known == sizes.layers for region in c.regions)

    gathers = [c for c in collectives if c.kind == "all-gather" and not in_layers(c)]
    return [c for c in gathers if any(map(is_whole, c.shapes))]


def _parts_of(size: int, ways: int) -> set[int]:
    """A dim, and what is left of it where so many devices share it."""
    return {size // part for part in range(1, ways + 1) if ways % part == 0 and size % part == 0}
