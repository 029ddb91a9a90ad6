"""Loading and writing piece by piece: the same bits on every mesh and in several processes, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

from drift_jax.config import MeshConfig
from drift_jax.models import rows
from drift_jax.models.hf import WeightFiles, load_params, load_qwen_config
from drift_jax.models.hf_export import save_hf
from drift_jax.models.published import ARCHITECTURES
from drift_jax.models.qwen import declare_qwen, param_shardings
from drift_jax.models.rows import Assembly
from drift_jax.models.safetensors_file import SafetensorsWriter
from drift_jax.sharding import build_layout, build_sharding
from scripts.make_random_model import make_random_model
from tests.hf_tensors import read_hf_tensors
from tests.tiny_models import build_tiny_model

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent


def to_bytes(model_dir: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in read_hf_tensors(model_dir).items()}


def fill_with_random_bits(model_dir: Path, dtype: str) -> None:
    """Every number a float can be, NaNs with something in them and subnormal ones too."""
    generator = np.random.default_rng(0)
    tensors = read_hf_tensors(model_dir)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with SafetensorsWriter(model_dir / "model.safetensors", shapes, dtype) as writer:
        for name, tensor in tensors.items():
            raw = generator.integers(0, 256, tensor.size * np.dtype(dtype).itemsize, np.uint8)
            writer.write(name, 0, raw.view(np.dtype(dtype)).reshape(tensor.shape))
        writer.finish()


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path, dtype: str) -> None:
    generator = np.random.default_rng(0)
    shapes = {"b": (5,), "a.weight": (7, 3), "ä": (4, 2, 3)}
    tensors = {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, shapes, dtype) as writer:
        for start, stop in ((4, 7), (0, 3), (3, 4)):
            writer.write("a.weight", start, tensors["a.weight"][start:stop])
        writer.write("ä", 0, tensors["ä"])
        writer.write("b", 0, tensors["b"])
        writer.finish()
    with safe_open(path, framework="numpy") as read:
        assert read.metadata() == {"format": "pt"}
        assert set(read.keys()) == set(shapes)
        for name, tensor in tensors.items():
            assert read.get_tensor(name).dtype == tensor.dtype
            assert read.get_tensor(name).tobytes() == tensor.tobytes()
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == 8 + header + sum(tensor.nbytes for tensor in tensors.values())


def test_a_file_with_a_hole_or_another_shape_is_a_bug(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", {"a": (4, 2)}, "float32") as writer:
        for first_row, wrong in (
            (0, np.zeros((1, 3), np.float32)),
            (3, np.zeros((2, 2), np.float32)),
            (0, np.zeros((1, 2))),
        ):
            with pytest.raises(AssertionError, match="of float32"):
                writer.write("a", first_row, wrong)
        writer.write("a", 0, np.zeros((3, 2), np.float32))
        with pytest.raises(AssertionError, match="8 bytes were not written"):
            writer.finish()


# --- pieces on a mesh --------------------------------------------------------------------------------------

MESHES = [
    ((1, 8, 1, 1), {}, {}),
    ((8, 1, 1, 1), {}, {}),
    ((2, 2, 2, 1), {}, {}),
    ((1, 2, 2, 2), {}, {"vocab_size": 510}),
    ((1, 1, 4, 2), {}, {"vocab_size": 511}),  # the vocabulary and the kv heads stay whole
    ((2, 4, 1, 1), {"layers": ("data",)}, {"num_hidden_layers": 4}),
]


@pytest.mark.mesh
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes,rules,model", MESHES)
def test_every_bit_survives_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], rules: dict, model: dict, dtype: str
) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 2**13)
    source = build_tiny_model(tmp_path / "source", **model)
    fill_with_random_bits(source, dtype)
    layout = build_layout(MeshConfig(*sizes, rules=rules))
    params = load_params(source, layout, dtype)
    shardings = jax.tree.leaves(param_shardings(declare_qwen(load_qwen_config(source))[1], layout))
    for array, sharding in zip(jax.tree.leaves(params), shardings, strict=True):
        assert array.sharding == sharding
        assert array.dtype == np.dtype(dtype)
    save_hf(params, source, tmp_path / "out", dtype, max_shard_gib=1e-4)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert to_bytes(tmp_path / "out") == to_bytes(source)


@pytest.mark.mesh
def test_float32_weights_are_rounded_as_numpy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 2**13)
    source = build_tiny_model(tmp_path / "source")
    save_hf(load_params(source, build_layout(MeshConfig(1, 4, 2))), source, tmp_path / "out", "bfloat16")
    expected = {k: v.astype(np.dtype("bfloat16")).tobytes() for k, v in read_hf_tensors(source).items()}
    assert to_bytes(tmp_path / "out") == expected


@pytest.mark.mesh
def test_each_tensor_is_opened_once_for_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_tiny_model(tmp_path / "source")
    opened, taken = Counter[str](), Counter[str]()
    read = WeightFiles.read

    def counting(self: WeightFiles, name: str, indices: Sequence[tuple[slice, ...]]) -> Iterator[np.ndarray]:
        opened[name] += 1
        for part in read(self, name, indices):
            taken[name] += part.nbytes
            yield part

    monkeypatch.setattr(WeightFiles, "read", counting)
    load_params(source, build_layout(MeshConfig(2, 2, 2)))
    tensors = read_hf_tensors(source)
    assert opened == dict.fromkeys(tensors, 1)
    assert taken == {name: tensor.nbytes for name, tensor in tensors.items()}


@pytest.mark.mesh
@pytest.mark.parametrize("shape,dims", [((4, 64, 96), ("layers", "embed", "mlp")), ((512, 64), ("vocab", "embed"))])
def test_rows_are_written_in_place(shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    sharding = build_sharding(build_layout(MeshConfig(1, 8, 1)), dims, shape)
    bfloat16 = np.dtype("bfloat16")
    assembly = Assembly(shape, bfloat16, sharding)
    place = [shard.data.unsafe_buffer_pointer() for shard in assembly._array.addressable_shards]
    piece = (shape[0] // 4, *shape[1:])
    for number in range(4):
        assembly.write(jax.device_put(np.full(piece, number, bfloat16), sharding), number * piece[0])
    array = assembly.finish()
    assert [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards] == place
    for number in range(4):
        assert (np.asarray(array[number * piece[0] : (number + 1) * piece[0]]) == number).all()


# --- several processes -------------------------------------------------------------------------------------


def run_two_processes(mode: str, model: Path, out: Path) -> list[dict[str, Any]]:
    """What each says at its end; see `hf_processes.py`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, str(HERE / "hf_processes.py"), mode, str(index), str(port), str(model), str(out)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        for index in range(2)
    ]
    try:
        return [json.loads(child.communicate(timeout=120)[0].splitlines()[-1]) for child in children]
    finally:
        for child in children:
            child.kill()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "source")


@pytest.mark.slow
def test_two_processes_read_their_shares_and_write_one_directory(model_dir: Path, tmp_path: Path) -> None:
    rows_said = run_two_processes("whole", model_dir, tmp_path / "out")
    tensors = read_hf_tensors(model_dir)
    for row in rows_said:
        # Of a mesh of fsdp 2 and tensor 2 a process has half: only what is small is on all devices.
        assert row["read"] == row["share"]
        assert 0.5 <= row["read"] / sum(tensor.nbytes for tensor in tensors.values()) < 0.6
        assert "config.json" in row["files"] and "model.safetensors.index.json" in row["files"]
        assert len([name for name in row["files"] if name.endswith(".safetensors")]) > 2
    expected = {name: tensor.astype(np.dtype("bfloat16")).tobytes() for name, tensor in tensors.items()}
    assert to_bytes(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode,words", [("disk", "No space left on device. Nothing was left behind"), ("weights", "no config.json in")]
)
def test_what_fails_on_one_process_is_raised_on_both(model_dir: Path, tmp_path: Path, mode: str, words: str) -> None:
    first, second = run_two_processes(mode, model_dir, tmp_path / "out")
    assert first["kind"] == "PeerError" and first["error"].startswith("process 1: ")
    assert words in first["error"] and words in second["error"]
    assert max(first["seconds"], second["seconds"]) < 30
    assert list(tmp_path.iterdir()) == []


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured here")
def test_loading_and_writing_take_little_more_than_the_parameters(tmp_path: Path) -> None:
    # Sized so that its pieces are to it what the usual ones are to a model of some GiB, and large enough for the 46 MB
    # that the process takes besides, whatever the size.
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    big = ARCHITECTURES["qwen2.5-7b"] | sizes | {"num_hidden_layers": 9, "vocab_size": 32000}
    small = big | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 512}
    make_random_model(big, tmp_path / "big")
    make_random_model(small, tmp_path / "small")
    # What is freed goes back to the system, so that what counts is what is held.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}

    def measure(piece_bytes: int) -> dict[str, float]:
        words = [str(tmp_path / "big"), str(tmp_path / "small"), "bfloat16", str(piece_bytes)]
        command = [sys.executable, str(HERE / "hf_memory.py"), *words]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])

    try:
        found, twin = measure(2**22), measure(2**40)
    finally:
        shutil.rmtree(tmp_path / "big")
    assert found["size"] > 300 * 2**20
    assert found["load"] <= 1.15 and found["load and export"] <= 1.15, found
    # With each parameter as one piece, as it was once, there is a second copy of the largest.
    assert twin["load"] > 1.15, twin
