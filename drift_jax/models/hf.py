"""Hugging Face directories in: safetensors only, piece by piece, never a second copy of the model or of a parameter.

Each process reads what its own devices need. A file is opened anew for each tensor: its pages are mapped memory, and
closing is what gives them back. `hf_export.py` is the way out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict  # pydantic needs it on Python 3.11

from drift_jax.distributed import on_each
from drift_jax.errors import ModelError
from drift_jax.files import leaves
from drift_jax.models.architecture import QwenConfig, how_to_get, load_hf_config, qwen_config_from_hf
from drift_jax.models.hf_layout import Bounds, copy_cast, hf_index, hf_names, hf_shape, is_stacked, view_as_ours
from drift_jax.models.qwen import Declared, declare_qwen, is_declared, param_shardings
from drift_jax.models.rows import PIECE_BYTES, Assembly, count_rows, cut_rows
from drift_jax.models.safetensors_file import DTYPES, check_header
from drift_jax.reading import check_form, read_json
from drift_jax.sharding import Layout

# The first one that is there says what a model may be used for; it goes along with what is made from the model.
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
# What a model directory holds besides weights and config.json.
COMPANION_FILES = (
    *LICENCE_FILES,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

Progress = Callable[[int, int], None]  # (bytes of this tensor, bytes of all)


def resolve_model(path: str, revision: str | None = None) -> Path:
    """A local directory as it is; a hub id is downloaded (safetensors, configs, tokenizer files and licence only).

    Raises:
      ModelError: there is neither a directory nor an answer from the hub.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        how = how_to_get(path) or "Give a Hugging Face directory or a hub id (org/name)."
        raise ModelError(f"no model directory at {path}. {how}")
    from huggingface_hub import snapshot_download

    try:
        # README.md names the licence as well: see report/card.py.
        patterns = ["*.safetensors", "*.safetensors.index.json", *COMPANION_FILES, "config.json", "README.md"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{path} is no directory here, and the hub did not give it ({type(error).__name__}: {error}). "
            "Check the name and the network, or download the model and pass its directory."
        ) from None


@dataclass(frozen=True)
class WeightFiles:
    """Which file holds which tensor, its shape and its dtype; opened and checked, nothing read yet."""

    where: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def open(model_dir: Path) -> WeightFiles:
        """Raises `ModelError` for a directory without safetensors, a truncated file or an odd dtype."""
        files = _weight_file_names(model_dir)
        where: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            if not os.path.exists(path):  # Path's own raises for a name that no file can have
                raise ModelError(f"{path!s:.300} is named by the index file but missing. Download it again.")
            check_header(path)
            try:
                with safe_open(path, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a dict)
                        piece = tensors.get_slice(name)
                        if piece.get_dtype() not in DTYPES:
                            raise ModelError(
                                f"{path}: tensor {name} is {piece.get_dtype()}; only "
                                f"{', '.join(DTYPES.values())} can be loaded (no quantised weights)."
                            )
                        if name in where:
                            raise ModelError(
                                f"{path}: tensor {name} is in {where[name].name} too. Remove the file that is not the "
                                "model's, or download the model again."
                            )
                        where[name], shapes[name] = path, tuple(piece.get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is not a whole safetensors file ({error}): {path.stat().st_size} bytes on disk. "
                    "Download or copy it again."
                ) from None
        return WeightFiles(where, shapes)

    def read(self, name: str, indices: Sequence[tuple[slice, ...]]) -> Iterator[np.ndarray]:
        """Slices of a tensor, one after the other; the file is open until the last one was taken."""
        with safe_open(self.where[name], framework="numpy") as tensors:
            whole = tensors.get_slice(name)
            for index in indices:
                yield whole[index]


def check_links(model_dir: Path) -> None:
    """Raises `ModelError` for a file of the model that is a link to elsewhere: it would be read, and exported."""
    names = ["config.json", "model.safetensors.index.json", *COMPANION_FILES]
    for path in [*(model_dir / name for name in names), *sorted(model_dir.glob("*.safetensors"))]:
        if path.is_symlink() and leaves(path, model_dir):
            raise ModelError(
                f"{path} is a link to {path.resolve()}, outside of the model's directory. If that is meant, copy the "
                "file there."
            )


class _Index(TypedDict):
    """model.safetensors.index.json: which file a tensor is in."""

    weight_map: dict[str, str]


def check_weights(model_dir: Path) -> None:
    """Holds the headers of a model's files against its config.json; reads no tensor but a head that is there twice.

    Raises:
      ModelError: as `load_params`.
    """
    config = load_qwen_config(model_dir)
    expected = jax.tree.leaves(declare_qwen(config)[1], is_leaf=is_declared)
    _check_tensors(WeightFiles.open(model_dir), expected, config, model_dir)


def _weight_file_names(model_dir: Path) -> list[Path]:
    check_links(model_dir)
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        found = read_json(index, "Download it again.", ModelError)
        names = check_form(_Index, found, str(index), "Download it again.", ModelError)["weight_map"].values()
        if not names:
            raise ModelError(f"{index} names no file. Download it again.")
        for name in names:
            # Anything else could name a file outside the directory.
            if name != os.path.basename(name) or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{index} names {name!r:.120}: weights are files of this directory, by their name alone. Take the "
                    "model from another repository."
                )
        return [model_dir / name for name in sorted(set(names))]
    files = sorted(model_dir.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in model_dir.glob("*.bin")) + sorted(p.name for p in model_dir.glob("*.pt*"))
    found = f" It holds {', '.join(pickles)}: pickles can run code and are never opened." if pickles else ""
    raise ModelError(
        f"no .safetensors file in {model_dir}.{found} "
        "Save the model with transformers' save_pretrained, which writes safetensors."
    )


def load_qwen_config(model_dir: Path) -> QwenConfig:
    return qwen_config_from_hf(load_hf_config(model_dir), source=str(model_dir / "config.json"))


def load_params(
    model_dir: Path, layout: Layout, dtype: str = "float32", progress: Progress | None = None
) -> dict[str, Any]:
    """Weights of a Hugging Face directory as `dtype`, on the devices of `layout`.

    Of several processes all must call it, and each reads what its devices hold. Memory: the parameters, and a few times
    the larger of one layer of one parameter and `rows.PIECE_BYTES`.

    Raises:
      ModelError: tensors missing or left over (all names listed), or of another shape than config.json says.
    """
    return on_each(lambda: _load(model_dir, layout, np.dtype(dtype), progress))


def _load(model_dir: Path, layout: Layout, dtype: np.dtype, progress: Progress | None) -> dict[str, Any]:
    config = load_qwen_config(model_dir)
    _, declared = declare_qwen(config)
    files = WeightFiles.open(model_dir)
    leaves, treedef = jax.tree.flatten(declared, is_leaf=is_declared)
    _check_tensors(files, leaves, config, model_dir)
    shardings = jax.tree.leaves(param_shardings(declared, layout))
    total = sum(math.prod(leaf.shape) for leaf in leaves) * dtype.itemsize
    arrays = []
    for leaf, sharding in zip(leaves, shardings, strict=True):
        arrays.append(_load_array(files, leaf, sharding, dtype))
        if progress is not None:
            progress(arrays[-1].nbytes, total)
    return jax.tree.unflatten(treedef, arrays)


def _check_tensors(files: WeightFiles, leaves: list[Declared], config: QwenConfig, model_dir: Path) -> None:
    expected = {name: hf_shape(leaf) for leaf in leaves for name in hf_names(leaf)}
    found = set(files.where)
    if config.tied and "lm_head.weight" in found:
        # Some writers store a tied head twice. It is the same tensor or the config is wrong.
        if not _are_equal(files, "model.embed_tokens.weight", "lm_head.weight"):
            raise ModelError(
                f"{model_dir}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight. Set tie_word_embeddings to false in config.json."
            )
        found.discard("lm_head.weight")
    problems = []
    if missing := sorted(expected.keys() - found):
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if extra := sorted(found - expected.keys()):
        problems.append(f"{len(extra)} left over: {', '.join(extra)}")
    problems += [
        f"{name} has shape {files.shapes[name]}, config.json means {shape}"
        for name, shape in expected.items()
        if name in files.shapes and files.shapes[name] != shape
    ]
    if problems:
        raise ModelError(f"{model_dir}: the tensors do not fit config.json: " + "; ".join(problems) + ".")


def _are_equal(files: WeightFiles, first: str, second: str) -> bool:
    rows, *rest = shape = files.shapes[first]
    if files.shapes[second] != shape:
        return False
    step = max(1, PIECE_BYTES // (4 * math.prod(rest)))
    pieces = [(slice(start, min(start + step, rows)),) for start in range(0, rows, step)]
    return all(np.array_equal(next(files.read(first, [piece])), next(files.read(second, [piece]))) for piece in pieces)


def _load_array(files: WeightFiles, leaf: Declared, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    first, *more = pieces = cut_rows(leaf.shape, sharding, dtype.itemsize)
    if not more:  # small: no program needs to be compiled
        return _load_rows(files, leaf, sharding, dtype, *first)
    assembly = Assembly(leaf.shape, dtype, sharding)
    for start, stop in pieces:
        assembly.write(_load_rows(files, leaf, sharding, dtype, start, stop), start)
    return assembly.finish()


def _load_rows(
    files: WeightFiles, leaf: Declared, sharding: NamedSharding, dtype: np.dtype, start: int, stop: int
) -> jax.Array:
    """Rows `start` to `stop` of every device's part (see `rows.py`), placed like the parameter."""
    devices_of: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        (first, _), *rest = (s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        devices_of.setdefault(((first + start, first + stop), *rest), []).append(device)
    # A CPU device may take an array's memory for its own: each piece has new arrays, which are not written again.
    blocks = _read_blocks(files, leaf, list(devices_of), dtype)
    shards = [
        jax.device_put(block, device)
        for block, devices in zip(blocks, devices_of.values(), strict=True)
        for device in devices
    ]
    parts, _ = count_rows(leaf.shape, sharding)
    shape = (parts * (stop - start), *leaf.shape[1:])
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, shards))


def _read_blocks(files: WeightFiles, leaf: Declared, boxes: Sequence[Bounds], dtype: np.dtype) -> list[np.ndarray]:
    """Boxes of a parameter. Each tensor is opened once for all of them, so that it comes from the disk once."""
    blocks = [np.empty([stop - start for start, stop in box], dtype) for box in boxes]
    names = hf_names(leaf)
    wanted: dict[str, list[tuple[np.ndarray, Bounds]]] = {}
    for block, (rows, *inner) in zip(blocks, boxes, strict=True):
        if not is_stacked(leaf):
            wanted.setdefault(names[0], []).append((block, (rows, *inner)))
            continue
        for row, layer in enumerate(range(*rows)):
            wanted.setdefault(names[layer], []).append((block[row], tuple(inner)))
    for name, targets in wanted.items():
        parts = files.read(name, [hf_index(leaf, bounds) for _, bounds in targets])
        for (target, bounds), part in zip(targets, parts, strict=True):
            copy_cast(target, view_as_ours(leaf, part, bounds))
    return blocks
