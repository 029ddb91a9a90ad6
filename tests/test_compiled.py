"""Programs that the next stage of a process takes over instead of tracing them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from drift_jax import compiled
from drift_jax.config import MeshConfig, TrainConfig
from drift_jax.models import decoding
from drift_jax.models.hf import load_qwen_config
from drift_jax.models.policy import load_policy
from drift_jax.models.qwen import declare_qwen
from drift_jax.sampling.base import SampleRequest, SamplingParams
from drift_jax.sampling.local import LocalSampler, split_policy
from drift_jax.sharding import build_layout
from drift_jax.train import Trainer
from tests.tiny_pairs import build_tiny_policy

GREEDY = SamplingParams(0.0, 1.0, 0, 4, 0, (1,), 300)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("compiled") / "model", tied=True)


def test_only_the_last_of_a_kind_is_kept() -> None:
    built: list[str] = []

    def build(name: str) -> str:
        built.append(name)
        return name

    for kind, key in (("a", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 1), ("a", 1)):
        assert compiled.recall(kind, key, lambda name=f"{kind}{key}": build(name)) == f"{kind}{key}"
    assert built == ["a1", "b1", "a2", "a1"]


def test_a_failed_build_is_not_kept() -> None:
    with pytest.raises(ZeroDivisionError):
        compiled.recall("a", 1, lambda: 1 // 0)
    assert compiled.recall("a", 1, lambda: 3) == 3


def _trainer(model_dir: Path, devices: int = 1, steps: int = 4, remat: str = "none", **changes: object) -> Trainer:
    graphdef, declared = declare_qwen(load_qwen_config(model_dir))
    layout = build_layout(MeshConfig(), jax.devices()[:devices])
    return Trainer(graphdef, declared, layout, dataclasses.replace(TrainConfig(), **changes), remat, steps)


def test_trainers_share_what_no_setting_parts(model_dir: Path) -> None:
    first = _trainer(model_dir)
    assert _trainer(model_dir).jitted_step is first.jitted_step
    others = [_trainer(model_dir, **one) for one in ({"devices": 2}, {"steps": 5}, {"remat": "dots"}, {"beta": 0.2})]
    assert len({id(trainer.jitted_step) for trainer in (first, *others)}) == 5


def test_a_second_sampler_compiles_nothing_and_takes_its_own_weights(model_dir: Path) -> None:
    policy = load_policy(model_dir, build_layout(MeshConfig(), jax.devices()[:1]), "float32")
    requests = [SampleRequest(str(i), 0, (5, 6, 7 + i)) for i in range(3)]
    first = LocalSampler(policy, 4)
    before = first.sample(requests, GREEDY)
    moved = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(0), p.shape), policy.params)

    sizes = [program._cache_size() for program in first.jitted]
    second = LocalSampler(dataclasses.replace(policy, params=moved), 4)
    found = second.sample(requests, GREEDY)
    assert second.jitted is first.jitted and [program._cache_size() for program in second.jitted] == sizes
    assert sum(sizes) >= 6
    assert [c.token_ids for c in found] != [c.token_ids for c in before]
    compiled._LAST.clear()
    fresh = LocalSampler(dataclasses.replace(policy, params=moved), 4).sample(requests, GREEDY)
    assert [(c.token_ids, c.token_logps) for c in fresh] == [(c.token_ids, c.token_logps) for c in found]


def test_a_second_policy_is_taken_apart_by_the_programs_of_the_first(model_dir: Path) -> None:
    sizes = []
    for _ in range(2):
        split_policy(load_policy(model_dir, build_layout(MeshConfig(), jax.devices()[:1]), "float32"))
        sizes.append(decoding._unstack._cache_size())
    assert sizes[0] == sizes[1] > 0
