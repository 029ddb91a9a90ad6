"""Hugging Face directories out: a layer of one parameter at a time, so that no host ever holds the model.

Of several processes each writes the files that are its own, into one directory on storage that all of them share.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, final

import jax
import numpy as np
from jax.sharding import NamedSharding

from drift_jax.distributed import gather, on_each, on_main
from drift_jax.errors import DriftError, StageError
from drift_jax.models.architecture import load_hf_config
from drift_jax.models.hf import COMPANION_FILES, check_links, load_qwen_config
from drift_jax.models.hf_layout import Bounds, copy_cast, hf_index, hf_names, hf_shape, is_stacked, view_as_ours
from drift_jax.models.qwen import Declared, declare_qwen, is_declared
from drift_jax.models.rows import count_rows, cut_rows, read_rows
from drift_jax.models.safetensors_file import SafetensorsWriter
from drift_jax.models.weight_changes import WeightChanges

Shapes = Mapping[str, tuple[int, ...]]  # of tensors by name, in the order in which they lie in a file


class Parameter(NamedTuple):
    leaf: Declared
    array: jax.Array
    sharding: NamedSharding


def save_hf(
    params: dict[str, Any], source_dir: Path, out_dir: Path, dtype: str, max_shard_gib: float = 4.0
) -> float | None:
    """Writes a directory that transformers and vLLM load.

    `source_dir` is the directory the policy came from: its config, generation config, tokenizer files and chat
    template go along. Written under a temporary name and renamed, so a directory of that name is whole. Of several
    processes all must call it; none returns before the directory is there. Host memory: a few times one layer of one
    parameter, or `rows.PIECE_BYTES`.

    Args:
      params: arrays placed on a mesh, as `load_params` or a restored checkpoint has them.

    Returns:
      The share of the weights that differ from those of `source_dir`, both as `dtype`; None where it has no such ones.

    Raises:
      StageError: the disk is full or not writable, or `out_dir` is there and is no model's directory; nothing is left
        behind. An error of one process is raised on all.
    """
    config = on_each(lambda: load_qwen_config(source_dir))
    _, declared = declare_qwen(config)
    parameters = [
        Parameter(leaf, array, array.sharding)
        for leaf, array in zip(jax.tree.leaves(declared, is_leaf=is_declared), jax.tree.leaves(params), strict=True)
    ]
    files = divide_into_files([leaf for leaf, _, _ in parameters], dtype, int(max_shard_gib * 2**30))
    shapes = {name: shape for file in files.values() for name, shape in file.items()}
    folder = _Folder(out_dir, files, dtype, WeightChanges(source_dir, shapes))
    on_main(folder.check_names)
    try:
        on_main(folder.make)
        with folder:
            on_each(folder.open_files)
            _write_weights(parameters, folder)
            on_each(folder.finish_files)
        on_main(lambda: folder.complete(source_dir))
        counts = gather((folder.changes.known, folder.changes.changed, folder.changes.weights))
    except DriftError:
        on_each(lambda: None)  # all have closed their files now
        on_main(folder.remove)
        raise
    return sum(n for _, n, _ in counts) / sum(n for *_, n in counts) if all(known for known, *_ in counts) else None


def divide_into_files(leaves: list[Declared], dtype: str, max_bytes: int) -> dict[str, Shapes]:
    """The tensors of each file: first those that are not part of a layer, then layer by layer."""
    stacked = [leaf for leaf in leaves if is_stacked(leaf)]
    shapes = {leaf.hf_name: hf_shape(leaf) for leaf in leaves if not is_stacked(leaf)}
    for names in zip(*(hf_names(leaf) for leaf in stacked), strict=True):
        shapes |= {name: hf_shape(leaf) for name, leaf in zip(names, stacked, strict=True)}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if files[-1] and filled + size > max_bytes:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": file for number, file in enumerate(files, 1)}


def count_bytes(files: Mapping[str, Shapes], dtype: str) -> int:
    return np.dtype(dtype).itemsize * sum(math.prod(shape) for file in files.values() for shape in file.values())


def weight_index(files: Mapping[str, Shapes], dtype: str) -> dict[str, Any]:
    """What `model.safetensors.index.json` holds."""
    weight_map = {tensor: name for name, shapes in files.items() for tensor in shapes}
    return {"metadata": {"total_size": count_bytes(files, dtype)}, "weight_map": weight_map}


def _write_weights(parameters: list[Parameter], folder: _Folder) -> None:
    """All tensors in the order of the files. A failed write is known to all processes one layer later."""
    for parameter in parameters:
        if not is_stacked(parameter.leaf):
            for start, stop in cut_rows(parameter.leaf.shape, parameter.sharding, parameter.array.dtype.itemsize):
                _write_rows(parameter, start, stop, folder)
            on_each(folder.check)
    stacked = [parameter for parameter in parameters if is_stacked(parameter.leaf)]
    _, layers = count_rows(stacked[0].leaf.shape, stacked[0].sharding)
    for layer in range(layers):
        for parameter in stacked:
            _write_rows(parameter, layer, layer + 1, folder)
        on_each(folder.check)


def _write_rows(parameter: Parameter, start: int, stop: int, folder: _Folder) -> None:
    """Rows `start` to `stop` of every part of a parameter (see `rows.py`) into the tensors that they belong to."""
    leaf, array, sharding = parameter
    # Of several processes the one that writes a file may hold only a part of what goes there.
    everywhere = not array.is_fully_addressable
    rows = read_rows(array, np.int32(start), stop - start, sharding, everywhere)
    rows = jax.block_until_ready(rows)
    parts, size = count_rows(leaf.shape, sharding)
    names = hf_names(leaf)
    inner = tuple((0, n) for n in leaf.shape[1:])
    for part in range(parts):
        first, at = part * size + start, part * (stop - start)  # in the parameter, and in `rows`
        if not is_stacked(leaf):
            _write_box(leaf, names[0], ((first, first + stop - start), *inner), rows, at, folder)
            continue
        for row in range(stop - start):
            _write_box(leaf, names[first + row], inner, rows, at + row, folder)


def _write_box(leaf: Declared, name: str, bounds: Bounds, rows: jax.Array, at: int, folder: _Folder) -> None:
    """A part of the tensor `name`, which is found in `rows` from row `at` on."""
    if not folder.owns(name):
        return
    index = hf_index(leaf, bounds)
    theirs = np.empty([piece.stop - piece.start for piece in index], folder.dtype)
    ours = view_as_ours(leaf, theirs, bounds)
    ours = ours[None] if is_stacked(leaf) else ours
    for ((low, high), *inner), shard in _distinct_shards(rows):
        start, stop = max(low, at), min(high, at + len(ours))
        if start < stop:
            place = (slice(start - at, stop - at), *(slice(*bound) for bound in inner))
            copy_cast(ours[place], np.asarray(shard)[start - low : stop - low])
    folder.write(name, index[0].start, theirs)


def _distinct_shards(array: jax.Array) -> Iterator[tuple[Bounds, jax.Array]]:
    """Place and data of what this process holds, copies left out.

    `np.asarray(array)` would be a second array of that size, and one that JAX keeps as long as the first.
    """
    seen = set()
    for shard in array.addressable_shards:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(shard.index, array.shape, strict=True))
        if bounds not in seen:
            seen.add(bounds)
            yield bounds, shard.data


@final
class _Folder:
    """A directory in the making, under a temporary name, and the files in it that this process writes."""

    def __init__(self, out_dir: Path, files: Mapping[str, Shapes], dtype: str, changes: WeightChanges) -> None:
        self.dtype, self.changes = np.dtype(dtype), changes
        # Where a link leads: the link stays, and a name is never `.` or `..`.
        self._dtype_name, self._out_dir, self._files = dtype, out_dir.resolve(), files
        self._path, self._old = (self._out_dir.with_name(f"{self._out_dir.name}.{end}") for end in ("tmp", "old"))
        self._own = [name for k, name in enumerate(files) if k % jax.process_count() == jax.process_index()]
        self._writers: dict[str, SafetensorsWriter] = {}
        self._file_of = {tensor: name for name in self._own for tensor in files[name]}
        self._failure: OSError | None = None
        self._closing = contextlib.ExitStack()

    def check_names(self) -> None:
        """Raises `StageError` where more than a model would be replaced; on process 0."""
        with self._refusals():
            for path in (self._out_dir, self._path, self._old):
                check_replaceable(path)

    def make(self) -> None:
        """An empty directory; on process 0."""
        with self._refusals():
            shutil.rmtree(self._path, ignore_errors=True)
            self._path.mkdir(parents=True)

    def open_files(self) -> None:
        if not self._path.is_dir():
            raise StageError(f"{self._path}, made by process 0, is not seen here. {_SHARE}")
        with self._refusals():
            for name in self._own:
                writer = SafetensorsWriter(self._path / name, self._files[name], self._dtype_name)
                self._writers[name] = self._closing.enter_context(writer)

    def owns(self, tensor: str) -> bool:
        return tensor in self._file_of

    def write(self, tensor: str, first_row: int, rows: np.ndarray) -> None:
        """Rows of a tensor of this process. An error is kept for `check`: until then others count on this process."""
        if self._failure is None:
            try:
                self._writers[self._file_of[tensor]].write(tensor, first_row, rows)
            except OSError as error:
                self._failure = error
            else:
                self.changes.count(tensor, first_row, rows)

    def check(self) -> None:
        """Raises `StageError` when a write has failed."""
        with self._refusals():
            if self._failure is not None:
                raise self._failure

    def finish_files(self) -> None:
        """Returns when the files of this process are on the disk."""
        with self._refusals():
            for writer in self._writers.values():
                writer.finish()

    def complete(self, source_dir: Path) -> None:
        """Adds what goes with the weights and gives the directory its name; on process 0."""
        for name in self._files:
            if not (self._path / name).exists():
                raise StageError(f"{self._path / name}, written by another process, is not seen here. {_SHARE}")
        with self._refusals():
            texts = {"config.json": load_hf_config(source_dir)}
            # transformers 4 reads torch_dtype, 5 reads dtype.
            texts["config.json"].pop("torch_dtype", None)
            texts["config.json"]["dtype"] = self._dtype_name
            if len(self._files) > 1:
                texts["model.safetensors.index.json"] = weight_index(self._files, self._dtype_name)
            for name, value in texts.items():
                (self._path / name).write_text(json.dumps(value, indent=2) + "\n")
            check_links(source_dir)
            companions = [name for name in COMPANION_FILES if (source_dir / name).exists()]
            for name in companions:
                shutil.copyfile(source_dir / name, self._path / name)
            for path in (*(self._path / name for name in (*texts, *companions)), self._path):
                _sync(path)
            self._replace()

    def _replace(self) -> None:
        """Gives the directory its name. The model that had it stays until then, and comes back where that fails."""
        shutil.rmtree(self._old, ignore_errors=True)
        replaces = self._out_dir.exists()
        if replaces:
            self._out_dir.rename(self._old)
        try:
            self._path.rename(self._out_dir)
        except OSError:
            if replaces:
                self._old.rename(self._out_dir)
            raise
        _sync(self._out_dir.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    def __enter__(self) -> _Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What the operating system refuses, as a `StageError`."""
        try:
            yield
        except OSError as error:
            remedy = "mend the path"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed = count_bytes(self._files, self._dtype_name) / 2**30
                remedy = f"free space (about {needed:.1f} GiB are needed)"
            raise StageError(
                f"cannot write the model to {self._out_dir}: {error}. Nothing was left behind; {remedy} and run again."
            ) from None


def check_replaceable(directory: Path) -> None:
    """Raises `StageError` for what is there and no model's directory: an export takes the whole name."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise StageError(f"{directory} is there and is no directory. Give the model a directory of its own.")
    entries = list(directory.iterdir())
    if not entries:
        return
    # A killed export has left weights without a config.
    of_model = any(path.suffix == ".safetensors" or path.name == "config.json" for path in entries)
    if not of_model or any(path.is_dir() for path in entries):
        what = "more than a model" if of_model else "no model"
        raise StageError(
            f"{directory} is there and holds {what}: all of it would be replaced. Give the model a directory of its "
            f"own, such as {directory / 'hf'}."
        )


_SHARE = "Several processes write one directory: name one on storage that all hosts share."


def _sync(path: Path) -> None:
    """Returns when a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for directories, which is no error
            raise
    finally:
        os.close(handle)
