"""Hugging Face directories in and out: bit-identical, or a clear refusal."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from drift_jax.config import MeshConfig
from drift_jax.errors import ConfigError, ModelError, StageError
from drift_jax.models.hf import load_params, load_qwen_config, resolve_model
from drift_jax.models.hf_export import save_hf
from drift_jax.sharding import Layout, build_layout
from drift_jax.stages.export import mesh_for_export
from tests.fake_hub import FakeHub
from tests.full_disk import full_disk  # noqa: F401
from tests.tiny_models import build_tiny_model


def single_device() -> Layout:
    return build_layout(MeshConfig(), jax.devices()[:1])


def read_all(model_dir: Path) -> dict[str, np.ndarray]:
    return {k: v for path in sorted(model_dir.glob("*.safetensors")) for k, v in load_file(path).items()}


def recast(model_dir: Path, dtype: str) -> None:
    """Rewrites the weights of a directory as `dtype`."""
    tensors = {k: v.astype(np.dtype(dtype)) for k, v in read_all(model_dir).items()}
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})


def edit_config(model_dir: Path, **changes: object) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture()
def model_dir(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "model")


@pytest.mark.parametrize("kind,tied", [("qwen2", False), ("qwen2", True), ("qwen3", False), ("qwen3", True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_identical(tmp_path: Path, kind: str, tied: bool, dtype: str) -> None:
    source = build_tiny_model(tmp_path / "source", kind, tied)
    recast(source, dtype)
    save_hf(load_params(source, single_device()), source, tmp_path / "out", dtype)
    before, after = read_all(source), read_all(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype == np.dtype(dtype)
        assert before[name].tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_round_trip_over_a_mesh_and_many_shards(model_dir: Path, tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    layout = build_layout(MeshConfig(*sizes))
    save_hf(load_params(model_dir, layout), model_dir, tmp_path / "out", "float32", max_shard_gib=1e-4)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    before, after = read_all(model_dir), read_all(tmp_path / "out")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    # And the sharded index can be read back, by us and by transformers.
    again = load_params(tmp_path / "out", layout)
    np.testing.assert_array_equal(again["embed"], before["model.embed_tokens.weight"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_device_holds_only_its_part(model_dir: Path) -> None:
    params = load_params(model_dir, build_layout(MeshConfig(1, 4, 2)))
    q = params["blocks"]["attention"]["q"]
    assert q.addressable_shards[0].data.shape == (3, 64 // 4, 4 // 2, 16)


def test_missing_and_left_over_tensors_are_named(model_dir: Path) -> None:
    tensors = read_all(model_dir)
    tensors["model.layers.7.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_params(model_dir, single_device())
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "model.layers.7.extra.weight" in str(caught.value)


def test_a_wrong_shape_is_named(model_dir: Path) -> None:
    edit_config(model_dir, intermediate_size=128)
    with pytest.raises(ModelError, match=r"up_proj.weight has shape \(96, 64\), config.json means \(128, 64\)"):
        load_params(model_dir, single_device())


def test_a_truncated_file_is_refused(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors is not a whole safetensors file"):
        load_params(model_dir, single_device())


def test_pickles_are_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: pickles can run code"):
        load_params(model_dir, single_device())


def test_a_missing_shard_is_named(model_dir: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is named by the index file but missing"):
        load_params(model_dir, single_device())


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7])
def test_an_index_names_files_of_its_directory_alone(model_dir: Path, tmp_path: Path, name: object) -> None:
    shutil.copytree(model_dir, tmp_path / "other")
    index = {"weight_map": dict.fromkeys(read_all(model_dir), name)}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError,
        match="index.json (names .*by their name alone|has another form: weight_map.*Input should be a valid string)",
    ):
        load_params(model_dir, single_device())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_that_leaves_the_directory_is_refused(model_dir: Path, tmp_path: Path, name: str) -> None:
    params = load_params(model_dir, single_device())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes((model_dir / name).read_bytes() if (model_dir / name).exists() else b"{}")
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).symlink_to(elsewhere)
    with pytest.raises(ModelError, match=f"{name} is a link to .*elsewhere, outside of the model's directory"):
        load_params(model_dir, single_device())
    with pytest.raises(ModelError, match="outside of the model's directory"):
        save_hf(params, model_dir, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hub_is_made_of_links(model_dir: Path, tmp_path: Path) -> None:
    """`snapshots/REVISION/NAME` is a link into `blobs`, as the hub's client leaves it."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in model_dir.iterdir():
        shutil.copyfile(path, cache / "blobs" / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"hash-of-{path.name}")
    found = load_params(snapshot, single_device())
    save_hf(found, snapshot, tmp_path / "out", "float32")
    assert read_all(tmp_path / "out").keys() == read_all(model_dir).keys()
    (tmp_path / "linked").symlink_to(snapshot)  # as a whole a model may be a link
    load_params(tmp_path / "linked", single_device())


def test_a_differing_tied_head_is_refused(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "m", tied=True)
    tensors = read_all(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, source / "model.safetensors")
    load_params(source, single_device())
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelError, match="lm_head.weight differs"):
        load_params(source, single_device())


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "architecture 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window = true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(model_dir: Path, changes: dict, words: str) -> None:
    edit_config(model_dir, **changes)
    with pytest.raises(ModelError, match=words):
        load_qwen_config(model_dir)


def test_a_transformers_4_config_means_the_same(model_dir: Path) -> None:
    expected = load_qwen_config(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    rope = config.pop("rope_parameters")
    (model_dir / "config.json").write_text(
        json.dumps(config | {"rope_theta": rope["rope_theta"], "rope_scaling": None})
    )
    assert load_qwen_config(model_dir) == expected


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model directory at"):
        resolve_model(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        load_qwen_config(tmp_path / "empty")


def test_a_hub_id_without_the_hub_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="Qwen/Nothing is no directory here, and the hub did not give it"):
        resolve_model("Qwen/Nothing")


def test_a_hub_model_comes_with_its_licence(model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also into what is exported from it; its README.md stays behind, as that of an export is of the export."""
    for name in ("LICENSE", "README.md", "pytorch_model.bin"):
        (model_dir / name).write_text(name)
    hub = FakeHub(model_dir, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    found = resolve_model("Some/Model", "main")
    names = {path.name for path in found.iterdir()}
    assert {"LICENSE", "README.md", "config.json", "model.safetensors"} <= names and "pytorch_model.bin" not in names
    save_hf(load_params(found, single_device()), found, tmp_path / "out", "float32")
    assert (tmp_path / "out/LICENSE").read_text() == "LICENSE" and not (tmp_path / "out/README.md").exists()


def test_an_indivisible_mesh_is_refused_with_both_numbers(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "m", hidden_size=60, num_attention_heads=4)
    with pytest.raises(ConfigError, match="size 60 cannot be split 8 ways"):
        load_params(source, build_layout(MeshConfig(1, 8, 1)))


def test_an_export_takes_a_mesh_that_divides_the_model(tmp_path: Path) -> None:
    """`drift export` has no mesh to set: a model that three devices trained would not come out of eight."""
    source = build_tiny_model(tmp_path / "m", hidden_size=60, num_attention_heads=4)
    mesh = mesh_for_export(source)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (2, 4, 1)
    assert load_params(source, build_layout(mesh))


def test_kv_heads_fewer_than_the_tensor_axis_are_replicated(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "m", num_attention_heads=8, num_key_value_heads=2)
    params = load_params(source, build_layout(MeshConfig(1, 2, 4)))
    assert params["blocks"]["attention"]["k"].addressable_shards[0].data.shape[2] == 2


def test_a_full_disk_leaves_nothing(model_dir: Path, tmp_path: Path, full_disk: Path) -> None:
    params = load_params(model_dir, single_device())
    with pytest.raises(StageError, match="No space left on device.*Nothing was left behind"):
        save_hf(params, model_dir, full_disk / "out", "float32")
    assert list(full_disk.iterdir()) == []


def test_an_old_directory_is_replaced_whole(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(model_dir, out)
    (out / "stale.txt").write_text("x")
    save_hf(load_params(model_dir, single_device()), model_dir, out, "bfloat16")
    assert not (out / "stale.txt").exists()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_no_model_is_not_replaced(model_dir: Path, tmp_path: Path) -> None:
    """`drift export --out DIR` once emptied whatever DIR was, a stage with its checkpoints too."""
    params = load_params(model_dir, single_device())
    stage, notes, file = tmp_path / "stage", tmp_path / "notes", tmp_path / "file"
    shutil.copytree(model_dir, stage / "hf")
    (stage / "config.json").write_text("{}")
    notes.mkdir()
    (notes / "thesis.txt").write_text("x")
    file.write_text("x")
    before = sorted(tmp_path.rglob("*"))
    refused = {stage: "holds more than a model", notes: "holds no model", file: "is no directory"}
    for out, why in (refused | {notes / ".." / "notes": "holds no model"}).items():
        with pytest.raises(StageError, match=f"{out.resolve()} is there and {why}"):
            save_hf(params, model_dir, out, "bfloat16")
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine.txt").write_text("x")
    with pytest.raises(StageError, match=r"out\.tmp is there and holds no model"):
        save_hf(params, model_dir, tmp_path / "out", "bfloat16")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out.tmp", tmp_path / "out.tmp" / "mine.txt"])


def test_a_link_and_a_bare_name_are_followed(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(model_dir, single_device())
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    save_hf(params, model_dir, tmp_path / "link", "bfloat16")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "model.safetensors").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_hf(params, model_dir, Path("."), "bfloat16")
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path != model_dir) == ["far", "here", "link"]


def test_the_old_model_stays_where_the_new_one_cannot_have_its_name(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    shutil.copytree(model_dir, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "out.tmp":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StageError, match="resource busy. Nothing was left behind; mend the path and run again"):
        save_hf(load_params(model_dir, single_device()), model_dir, out, "float32")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path != model_dir] == ["out"]
