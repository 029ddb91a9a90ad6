"""Checkpoints: what is saved comes back, on another mesh, the newest few are kept, and a full disk is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax import checkpoint as checkpoint_module
from drift_jax.checkpoint import CHECKSUMS_FILE, Checkpointer, SaveClock, find_damage, seal
from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.data.batches import PairLoader
from drift_jax.data.packing import Split
from drift_jax.errors import StageError
from drift_jax.models.architecture import QwenConfig
from drift_jax.models.qwen import declare_qwen, init_params
from drift_jax.sharding import build_layout
from drift_jax.step import TrainState
from drift_jax.train import Trainer
from tests.full_disk import full_disk  # noqa: F401
from tests.processes import run_together
from tests.tiny_models import VOCAB
from tests.tiny_pairs import random_pairs

QWEN = QwenConfig("qwen2", VOCAB, 64, 2, 4, 2, 16, 96, 1e4, 1e-6, tied=True, qkv_bias=True, qk_norm=False)
CONFIG = TrainConfig(batch_size=8, optimizer="adamw", learning_rate=1e-3)


def make_trainer(sizes: tuple[int, ...]) -> Trainer:
    devices = jax.devices()[: int(np.prod(sizes))]
    return Trainer(*declare_qwen(QWEN), build_layout(MeshConfig(*sizes), devices), CONFIG, "none", 8)


def make_loader(ways: int = 1) -> PairLoader:
    return PairLoader(random_pairs(24), np.full((24, 2), -90.0), 8, 1, max_length=128, seed=1, split=Split(ways))


def save(checkpointer: Checkpointer, state: TrainState) -> None:
    step = int(state.step)
    checkpointer.save(step, {"params": state.params, "optimizer": state.opt_state}, {"step": step, "note": "x"})


def restore(checkpointer: Checkpointer, trainer: Trainer, step: int) -> TrainState:
    abstract = trainer.abstract_state
    items = checkpointer.restore(step, {"params": abstract.params, "optimizer": abstract.opt_state})
    return trainer.state_at(step, items["params"], items["optimizer"])


def assert_equal(a: TrainState, b: TrainState) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A checkpoint of two updates on eight devices that share the weights, and what is in it."""
    directory = tmp_path_factory.mktemp("saved") / "c"
    trainer = make_trainer((1, 8, 1))
    state = trainer.init_state(init_params(QWEN, 0, trainer.layout))
    for _ in range(2):
        state, _ = trainer.step(state, make_loader(ways=8).shuffled(int(state.step)))
    with Checkpointer(directory, keep=2) as checkpointer:
        save(checkpointer, state)
    return directory, state


@pytest.mark.mesh
@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 1)])
def test_restored_on_another_mesh_bit_for_bit(saved: tuple[Path, TrainState], sizes: tuple[int, int, int, int]) -> None:
    directory, state = saved
    other = make_trainer(sizes)
    with Checkpointer(directory, keep=2) as checkpointer:
        assert checkpointer.latest_step() == 2
        assert checkpointer.read_meta(2) == {"step": 2, "note": "x"}
        restored = restore(checkpointer, other, 2)
    assert_equal(restored, state)
    table = restored.params["embed"]
    assert table.sharding.mesh.shape == other.layout.mesh.shape


@pytest.mark.slow
def test_restored_in_two_processes_bit_for_bit(saved: tuple[Path, TrainState], tmp_path: Path) -> None:
    """Each gets its part; a number that is changed afterwards is seen by the one that has it."""
    directory, state = saved
    leaves = {str(name): np.array(leaf) for name, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(tmp_path / "state.npz", **leaves)
    expected = [(0, "process 0 of 2: "), (0, "process 1 of 2: ")]
    ends = run_together("tests.restore_part", 2, directory, tmp_path / "state.npz")
    assert [(code, output.splitlines()[-1][: len("process 0 of 2: ")]) for code, output in ends] == expected, ends
    largest = max(leaves, key=lambda name: leaves[name].size)
    leaves[largest].flat[-1] += 1
    np.savez(tmp_path / "state.npz", **leaves)
    ends = run_together("tests.restore_part", 2, directory, tmp_path / "state.npz")
    assert any(code and "Mismatched elements: 1 /" in output for code, output in ends)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Bit for bit, over an epoch's end: five updates in one go, and two, a restart, three."""

    def go_on(trainer: Trainer, state: TrainState, until: int) -> TrainState:
        return [after for after, *_ in trainer.fit(state, make_loader(), until)][-1]

    whole = make_trainer((1, 1, 1))
    expected = go_on(whole, whole.init_state(init_params(QWEN, 0, whole.layout)), 5)
    first = make_trainer((1, 1, 1))
    with Checkpointer(tmp_path / "c", keep=1) as checkpointer:
        save(checkpointer, go_on(first, first.init_state(init_params(QWEN, 0, first.layout)), 2))
    second = make_trainer((1, 1, 1))
    with Checkpointer(tmp_path / "c", keep=1) as checkpointer:
        resumed = go_on(second, restore(checkpointer, second, 2), 5)
    assert_equal(resumed, expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "c", keep=2) as checkpointer:
        for step in range(1, 5):
            checkpointer.save(step, {"params": {"w": jnp.full(4, step)}}, {})
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "4"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "c", keep=1) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.ones(4)}}, {})
        checkpointer.wait()
        with pytest.raises(StageError, match="does not fit this model and optimizer"):
            checkpointer.restore(1, {"params": {"w": jax.ShapeDtypeStruct((5,), jnp.float32), "b": jnp.ones(2)}})


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(full_disk: Path) -> None:
    checkpointer = Checkpointer(full_disk / "c", keep=2)
    checkpointer.save(1, {"params": {"w": jnp.ones(16)}}, {})
    checkpointer.wait()
    rng = np.random.default_rng(0)
    with pytest.raises(StageError, match="cannot write a checkpoint.*The last whole one is of update 1"), checkpointer:
        checkpointer.save(2, {"params": {"w": jnp.asarray(rng.normal(size=10**5))}}, {})
        checkpointer.wait()
    assert Checkpointer(full_disk / "c", keep=2).latest_step() == 1


@pytest.fixture()
def three(tmp_path: Path) -> Path:
    """Three checkpoints, of steps 1 to 3."""
    with Checkpointer(tmp_path / "c", keep=3) as checkpointer:
        for step in range(1, 4):
            weights = np.random.default_rng(step).normal(size=1000)
            checkpointer.save(step, {"params": {"w": jnp.asarray(weights)}}, {})
    return tmp_path / "c"


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(three: Path) -> None:
    (largest,) = sorted((p for p in (three / "3").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)[-1:]
    data = bytearray(largest.read_bytes())
    data[-100] ^= 1
    largest.write_bytes(data)
    next((three / "2").rglob("_METADATA")).unlink()
    said: list[str] = []
    assert Checkpointer(three, keep=3).newest_whole(said.append) == 1  # a reader leaves all as it is
    with Checkpointer(three, keep=3, alone=True) as checkpointer:
        assert checkpointer.newest_whole(said.append) == 1
        assert [line.split(" (")[0] for line in said] == [
            f"the checkpoint of update {n} is damaged" for n in (3, 2)
        ] * 2
        assert f"{largest.relative_to(three / '3')} has other bytes than were written" in said[2]
        assert "params/_METADATA is missing" in said[3] and "put aside as 2.damaged" in said[3]
        checkpointer.save(2, {"params": {"w": jnp.ones(1000)}}, {})
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "2.damaged", "3.damaged"]
    assert Checkpointer(three, keep=3).newest_whole(said.append) == 2


def test_what_is_said_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    """Each file is looked at, and one that was cut off is told from one whose bytes have changed."""
    (tmp_path / "params").mkdir()
    files = [tmp_path / "params" / name for name in ("a", "b", "c", "d")]
    for file in files:
        file.write_bytes(b"0123456789")
    seal(tmp_path)
    assert find_damage(tmp_path) is None
    files[1].write_bytes(b"01234")
    assert find_damage(tmp_path) == "params/b has 5 of 10 bytes"
    files[2].write_bytes(b"0123456780")
    files[3].unlink()
    assert find_damage(tmp_path) == "params/b has 5 of 10 bytes and 2 more"
    files[1].write_bytes(b"0123456789")
    assert find_damage(tmp_path) == "params/c has other bytes than were written and 1 more"
    (tmp_path / CHECKSUMS_FILE).write_text('{"files": []}')
    assert find_damage(tmp_path) == f"{CHECKSUMS_FILE} is not what was written"
    (tmp_path / CHECKSUMS_FILE).write_text(json.dumps({"files": {"9" * 5000: {"bytes": 1, "xxh3_128": ""}}}))
    assert find_damage(tmp_path) == f"{'9' * 120} is missing"
    assert find_damage(tmp_path / "other") == f"{tmp_path / 'other'} is missing"


def test_one_without_checksums_is_believed_and_one_without_a_name_is_not_read(three: Path) -> None:
    """The first is of before there were checksums; the second of a process that was killed while it wrote."""
    (three / "3").rename(three / "3.orbax-checkpoint-tmp")
    (three / "2" / "checksums.json").unlink()
    with Checkpointer(three, keep=3, alone=True) as checkpointer:
        assert checkpointer.newest_whole(print) == 2
        checkpointer.save(3, {"params": {"w": jnp.ones(1000)}}, {})
    assert sorted(p.name for p in three.iterdir()) == ["1", "2", "3"]


def test_a_checkpoint_is_due_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of 2 seconds, later of 4: process 0 is seldom asked, and late by an update where they are alike."""
    now, asked = [0.0], []
    clock_of_process_0 = SimpleNamespace(monotonic=lambda: asked.append(now[0]) or now[0])
    monkeypatch.setattr(checkpoint_module, "time", clock_of_process_0)
    clock, due, last = SaveClock(1.0, 0), [], 0.0
    for step in range(1, 100):
        now[0] += 2 if step < 50 else 4
        if clock.is_due(step):
            due.append(now[0] - last)
            last = now[0]
            clock.saved(step)
    assert [60 <= passed < 65 for passed in due] == [True, False, True, True] and max(due) < 90, due
    assert len(asked) < 40, asked
    assert not SaveClock(None, 0).is_due(10**6)
