"""The simulated user, the logs and the numbers of `scripts/study_verifiable.py`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.config import MeshConfig, load_config
from drift_jax.models.policy import load_policy
from drift_jax.records import DsatRecord, Message
from drift_jax.sharding import build_layout
from tests.tiny_pairs import build_tiny_policy

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "scripts"))

import study_verifiable  # noqa: E402
from study import measure, user  # noqa: E402
from study.logs import whole_sentences  # noqa: E402
from study.results import summarise, table  # noqa: E402

QUESTION = "How do I keep basil alive on a windowsill?"
GOOD = "Water the basil when its soil is dry, and turn it now and then."


@pytest.mark.parametrize(
    ("reply", "unmet"),
    [
        (GOOD, []),
        ("Basil " + "likes light " * 12 + "a lot.", ["short"]),
        ("Basil:\n- water\n- light.", ["plain"]),
        ("1. Water the basil.", ["plain"]),
        ("Water the basil when its soil is", ["finished"]),
        ("I am happy to help you with that!", ["on_topic"]),
        ("", ["short", "finished", "on_topic"]),
        ("I got 3. place - not bad, said Basil.", []),
    ],
)
def test_wishes(reply: str, unmet: list[str]) -> None:
    assert user.unmet_wishes(QUESTION, reply) == unmet
    assert user.is_satisfied(QUESTION, reply) is not bool(unmet)
    said = user.complain("some id", QUESTION, reply)
    assert said in user.WISHES[unmet[0]].complaints if unmet else said is None


def test_the_bound_of_words_is_met_exactly() -> None:
    reply = "Basil " + "word " * (user.MOST_WORDS - 2)
    assert user.is_satisfied(QUESTION, reply + "end.")
    assert user.unmet_wishes(QUESTION, reply + "and end.") == ["short"]


def test_all_phrasings_are_used_and_an_id_always_gets_the_same_one() -> None:
    said = [user.complain(f"id-{i}", QUESTION, "word " * 60) for i in range(200)]
    assert set(said) == set(user.WISHES["short"].complaints)
    assert said == [user.complain(f"id-{i}", QUESTION, "word " * 60) for i in range(200)]


def test_the_user_ranks() -> None:
    record = DsatRecord("a", (Message("user", QUESTION),), "old", "too long")
    assert user.score(record, GOOD) == 1.0 > user.score(record, "- " + "basil " * 60) == 0.25


def test_each_training_prompt_has_a_word_that_the_topic_is_known_by() -> None:
    rows = [json.loads(line) for line in (study_verifiable.CONFIGS / "prompts.jsonl").read_text("utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 120
    assert len({row["prompt"].lower() for row in rows}) == len(rows)
    assert all(not user.is_on_topic(row["prompt"], "Certainly!") for row in rows)
    assert all(user.is_on_topic(row["prompt"], row["prompt"].upper()) for row in rows)


def test_whole_sentences() -> None:
    assert whole_sentences(" One. Two (2.5 of it)! And th") == "One. Two (2.5 of it)!"
    assert whole_sentences("no end at all") == "no end at all"
    assert whole_sentences('He said "so."\nThen') == 'He said "so."'


def test_the_configs_differ_in_method_and_rate_alone() -> None:
    configs = [load_config(study_verifiable.CONFIGS / f"{name}.yaml") for name in study_verifiable.METHODS]
    assert [config.recipe.method for config in configs] == list(study_verifiable.METHODS)
    texts = []
    for name in study_verifiable.METHODS:
        lines = (study_verifiable.CONFIGS / f"{name}.yaml").read_text("utf-8").splitlines()[1:]
        texts.append([line for line in lines if not line.strip().startswith(("run_dir:", "method:", "learning_rate:"))])
    assert all(text == texts[0] for text in texts)


def test_distinct_looks_at_equally_many_words() -> None:
    words = " ".join(f"w{i}" for i in range(60))
    assert measure._of_draws([[words, "a a a a"], [words, "a a a a"]]) == {
        "distinct_1": [0.5, 1 / 8],
        "distinct_2": [0.5, 1 / 6],
    }


def test_kl_of_replies_equals_that_of_the_definition(tmp_path: Path) -> None:
    layout = build_layout(MeshConfig(), jax.devices()[:1])
    base = load_policy(build_tiny_policy(tmp_path / "model", tied=True), layout, "float32")
    key = jax.random.key(1)
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(key, p.shape), base.params)
    policy = SimpleNamespace(graphdef=base.graphdef, params=moved, layout=layout)
    prompts, replies = [[5, 6, 7], [9]], [[8, 4], [3, 2, 1, 4, 5]]
    ids, mask = measure.pad_rows(prompts, replies)
    found = measure.reply_kl(policy, base, ids, mask)  # pyright: ignore[reportArgumentType]
    from drift_jax.models.policy import bind

    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        tokens = jnp.asarray([[*prompt, *reply]])
        at = jnp.arange(tokens.shape[1])[None]
        ours, theirs = (
            np.asarray(jax.nn.log_softmax(model.logits(model.hidden(tokens, at))), np.float64)[0]
            for model in (bind(base.graphdef, params) for params in (moved, base.params))
        )
        places = range(len(prompt) - 1, len(prompt) + len(reply) - 1)
        expected = sum(float((np.exp(ours[t]) * (ours[t] - theirs[t])).sum()) for t in places)
        assert expected > 0.01
        assert math.isclose(found[row], expected, rel_tol=1e-4)
    assert found[2:].tolist() == [0.0] * (len(found) - 2)
    np.testing.assert_allclose(measure.reply_kl(base, base, ids, mask), 0.0, atol=1e-6)


def _measured(folder: Path, satisfied: list[float]) -> None:
    folder.mkdir(parents=True)
    (folder / "measured.json").write_text(
        json.dumps({"per_prompt": {"satisfied": satisfied}, "draws": {"distinct_2": [0.5, 0.7]}, "replies": {}})
    )


def test_results_compare_by_question(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        before = rng.integers(0, 2, 30) / 2
        _measured(tmp_path / f"base-s{seed}" / "held_out", before.tolist())
        for method, gain in (("drift", 0.5), ("spin", 0.0)):
            stage = tmp_path / f"{method}-s{seed}" / "iter_1"
            _measured(stage / "held_out", (before + gain).tolist())
            row = {"step": 1, "loss": 0.5, "grad_norm": 3.0, "rewards/margins": 1.0, "rewards/accuracies": 1.0}
            (stage / "metrics.jsonl").write_text(
                json.dumps(row) + "\n" + json.dumps(row | {"step": 2, "grad_norm": 5.0, "rewards/margins": 2.0}) + "\n"
            )
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.json").write_text("{}")
    (tmp_path / "seconds.json").write_text('{"seconds": 12}')
    found = summarise(tmp_path, ["drift", "spin"], [0, 1])
    drift, spin = (found["metrics"]["satisfied"][method] for method in ("drift", "spin"))
    assert drift[1]["value"] == pytest.approx(drift[0]["value"] + 0.5)
    assert drift[1]["gain"] == {"value": 0.5, "interval": [0.5, 0.5]}  # each question gained as much
    assert spin[1]["gain"]["value"] == 0 and spin[0]["interval"][0] < spin[0]["value"] < spin[0]["interval"][1]
    assert found["metrics"]["grad_norm"]["drift"][1]["value"] == 4.0
    assert found["metrics"]["margin"]["drift"][1]["value"] == 2.0
    assert found["headline"]["drift_gain"] == [0.5, 0.5]
    lines = table(found["metrics"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| drift", "| spin"]
