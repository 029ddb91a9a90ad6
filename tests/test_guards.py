"""The guards on made-up numbers: runs that must stop, runs that must warn, and runs that must do neither."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from drift_jax.config import TrainConfig
from drift_jax.errors import StageError
from drift_jax.guards import RewardWatch, check_first_loss, check_params_changed, emptied_warning
from drift_jax.telemetry import MetricsWriter, read_metrics

CONFIG = TrainConfig()  # beta 0.1, a warm-up by ratio
LOGPS = -200.0  # the reference's log-probability of a rejected reply, in nats


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_the_first_loss_must_be_ln_2() -> None:
    cfg = config(rpo_alpha=0.5)
    for off in (0.0, 9e-4, -9e-4):
        check_first_loss(
            {"loss": math.log(2) + 0.5 * 3.0 + off, "nll_loss": 3.0, "logps/chosen": -200.0, "logps/rejected": -100.0},
            cfg,
        )
    for off in (1.1e-3, -1.1e-3, math.nan):
        with pytest.raises(StageError, match=r"not ln 2 = 0\.693147.*ref_logps"):
            check_first_loss(
                {
                    "loss": math.log(2) + 0.5 * 3.0 + off,
                    "nll_loss": 3.0,
                    "logps/chosen": -200.0,
                    "logps/rejected": -100.0,
                },
                cfg,
            )


def test_in_bfloat16_the_first_loss_may_miss_ln_2_by_its_roundings_and_no_more() -> None:
    """Half of beta times the roundings of the longer log-prob: 0.5 * 0.1 * 200 / 256 nats."""
    room = 0.5 * 0.1 * 200 / 256
    for off, sound in ((0.9 * room, True), (-0.9 * room, True), (1.1 * room, False), (-1.1 * room, False)):
        metrics = {"loss": math.log(2) + off, "nll_loss": 0.0, "logps/chosen": -120.0, "logps/rejected": LOGPS}
        if sound:
            check_first_loss(metrics, CONFIG, "bfloat16")
            with pytest.raises(StageError, match="not ln 2"):  # float32 has no such roundings
                check_first_loss(metrics, CONFIG)
        else:
            with pytest.raises(StageError, match=r"not ln 2 = 0\.693147 within 0\.04 \(bfloat16\)"):
                check_first_loss(metrics, CONFIG, "bfloat16")


def changed(share: float, learning_rate: float = 1.4e-8) -> dict[str, float]:
    return {"params_changed": share, "learning_rate": learning_rate}


def test_a_first_update_that_reaches_too_few_weights_stops_the_stage() -> None:
    check_params_changed(2, changed(0.9), CONFIG)
    for share in (0.8999, 0.0, math.nan):
        with pytest.raises(StageError) as error:
            check_params_changed(2, changed(share), CONFIG)
        for part in ("update 2", f"{share:.4%}", "90.0000%", "1.4e-08", "5e-07", "train.master_dtype=float32"):
            assert part in str(error.value)


def test_the_share_is_looked_at_where_the_learning_rate_is_first_above_0() -> None:
    """The first update of a warm-up has learning rate 0 and changes nothing; later updates may change less."""
    check_params_changed(1, changed(0.0, 0.0), CONFIG)
    check_params_changed(3, changed(0.0), CONFIG)
    without = config(warmup_ratio=0.0)
    with pytest.raises(StageError, match="update 1"):
        check_params_changed(1, changed(0.5), without)
    check_params_changed(2, changed(0.5), without)
    with pytest.raises(StageError, match="update 2"):
        check_params_changed(2, changed(0.5), config(warmup_ratio=0.0, warmup_steps=1))


def test_stochastic_rounding_changes_few_weights_but_some() -> None:
    cfg = config(master_dtype="bfloat16")
    check_params_changed(2, changed(2e-4), cfg)
    for share in (0.0, math.nan):
        with pytest.raises(StageError, match="train.master_dtype=bfloat16"):
            check_params_changed(2, changed(share), cfg)


def metrics(chosen: float, rejected: float, reference: float = LOGPS) -> dict[str, float]:
    """What an update reports for log-ratios in nats."""
    beta = CONFIG.beta
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "logps/rejected": reference + rejected,
    }


def watch_run(chosen: Any, rejected: Any, reference: Any = LOGPS, cfg: TrainConfig = CONFIG) -> list[tuple[int, str]]:
    """(update, warning) of a run that is given by its log-ratios per update."""
    watch = RewardWatch(cfg, len(chosen))
    rows = zip(chosen, rejected, np.broadcast_to(reference, len(chosen)), strict=True)
    return [(step, text) for step, row in enumerate(rows, start=1) for text in watch.update(step, metrics(*row))]


def noise(size: int, scale: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, size)


def test_both_rewards_falling_warns_once_with_the_numbers_of_both_windows() -> None:
    steps = np.arange(60)
    (found,) = watch_run(-0.1 * steps, -0.3 * steps)
    step, text = found
    assert step == 20  # where two windows of ten are full
    for part in ("updates 1 to 10", "updates 11 to 20", "from -0.0450 to -0.1450", "from -0.1350 to -0.4350"):
        assert part in text
    for part in ("both rewards fall", "-1.45 nats", "likelihood displacement", "train.rpo_alpha (now 0.001)"):
        assert part in text
    assert "train.learning_rate (now 5e-07)" in text


def test_falling_rewards_are_seen_through_noise() -> None:
    steps = np.arange(200)
    for seed in range(20):
        (found,) = watch_run(-0.05 * steps + noise(200, 1.0, seed), -0.2 * steps + noise(200, 1.0, seed + 100))
        assert 20 <= found[0] <= 100, found


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_noise_around_0_does_not_warn(scale: float) -> None:
    """Both at once, as the pairs of a batch move both sides: 30 runs of 300 updates."""
    for seed in range(30):
        common = noise(300, scale, seed)
        assert watch_run(common + noise(300, scale, seed + 50), common + noise(300, scale, seed + 90)) == []


def test_healthy_runs_do_not_warn() -> None:
    steps = np.arange(300)
    runs = {
        "chosen rises, rejected falls": (0.02 * steps, -0.2 * steps),
        "chosen dips a little and recovers": (-0.5 * np.sin(np.pi * steps / 300), -0.1 * steps),
        "both rise": (0.1 * steps, 0.01 * steps),
        "chosen falls, rejected rises": (-0.1 * steps, 0.1 * steps),
        "chosen comes back from below, rejected falls": (
            np.abs(0.1 * (steps - 100)) - 10.0,
            -0.1 * np.abs(steps - 120),
        ),
        "nothing moves": (0.0 * steps, 0.0 * steps),
    }
    for name, (chosen, rejected) in runs.items():
        for seed in range(5):
            assert watch_run(chosen + noise(300, 0.3, seed), rejected + noise(300, 0.3, seed + 9)) == [], name


def test_rejected_collapse_warns_once() -> None:
    """The mean of ten updates passes twice the reference's -200 nats where the fall passes 200."""
    steps = np.arange(80)
    (found,) = watch_run(0.1 * steps, -5.0 * steps)
    step, text = found
    assert step == 46  # updates 37 to 46 have log-ratios -5 * (36 to 45), their mean is -202.5 nats
    for part in ("updates 37 to 46", "is -402.5 nats", "2 times the reference's -200.0", "rewards/rejected -20.2500"):
        assert part in text
    for part in ("rejected log-probs collapse", "train.learning_rate (now 5e-07)", "train.beta (now 0.1)"):
        assert part in text


def test_short_rejected_replies_may_double_their_log_prob() -> None:
    """One token at -3 nats that goes to -9 is what the loss asks for; at -14 its reward is below -1."""
    assert watch_run(np.ones(40), np.full(40, -6.0), reference=-3.0) == []
    ((_, text),) = watch_run(np.ones(40), np.full(40, -11.0), reference=-3.0)
    assert "rejected log-probs collapse" in text


def test_both_kinds_may_warn_and_beta_is_read() -> None:
    steps = np.arange(80)
    kinds = [text.split(":")[0] for _, text in watch_run(-1.0 * steps, -6.0 * steps)]
    assert kinds == ["both rewards fall", "rejected log-probs collapse"]
    # The same rewards at a beta of 1 are a tenth of the nats: 0.9 at the end.
    falling = np.linspace(0, -9, 40)
    assert len(watch_run(falling, falling)) == 1
    assert watch_run(falling, falling, cfg=config(beta=1.0)) == []


def test_short_stages() -> None:
    """A stage of 6 to 19 updates has windows of half its updates; of fewer nothing is said."""
    for total in (6, 7, 12, 19):
        steps = np.arange(total)
        (found,) = watch_run(-1.0 * steps, -1.0 * steps)
        assert f"updates {found[0] - total // 2 + 1} to {found[0]} " in found[1]
    for total in (0, 1, 5):
        assert watch_run(-10.0 * np.arange(total), -300.0 * np.arange(total)) == []


def test_rows_without_finite_numbers_are_passed_over() -> None:
    steps = np.arange(60)
    chosen, rejected = -0.1 * steps, -0.3 * steps
    broken = chosen.copy()
    broken[::7] = np.nan
    rejected[5::7] = np.inf
    (found,) = watch_run(broken, rejected)
    assert "nan" not in found[1] and "inf" not in found[1]
    assert watch_run(np.full(60, np.nan), rejected) == []
    watch = RewardWatch(CONFIG, 60)
    assert all(watch.update(step, {"loss": 1.0}) == [] for step in range(1, 60)), "rows that hold other metrics"


def test_a_resumed_watch_goes_on_where_the_first_one_was(tmp_path: Any) -> None:
    """Fed from metrics.jsonl it warns at the same update, of the same windows, and never twice."""
    steps = np.arange(60)
    chosen, rejected = -0.06 * steps, -6.0 * steps
    expected = watch_run(chosen, rejected)
    assert [step for step, _ in expected] == [23, 39]
    for cut in (5, 22, 30, 45):
        with MetricsWriter(tmp_path / str(cut)) as writer:
            for step in range(1, cut + 1):
                writer.write(step, metrics(chosen[step - 1], rejected[step - 1]))
        watch = RewardWatch(CONFIG, 60, read_metrics(tmp_path / str(cut)))
        rows = [(step, metrics(chosen[step - 1], rejected[step - 1])) for step in range(cut - 1, 61)]  # two repeated
        assert [(s, text) for s, row in rows for text in watch.update(s, row)] == [e for e in expected if e[0] > cut]


def test_emptied_completions_are_named() -> None:
    assert emptied_warning([], 10, "train") is None
    text = emptied_warning([f"id{i}" for i in range(7)], 64, "train")
    assert text is not None
    for part in ("7 of 64 train pairs (10.9%)", "id0, id1, id2, id3, id4 and 2 more", "data.max_length"):
        assert part in text
    assert "data.max_prompt_length" in text
    assert "more" not in (emptied_warning(["a", "b"], 2, "held-out") or "more")
