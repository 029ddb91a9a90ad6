"""What processes exchange, who starts them, and journals of several of them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from drift_jax import distributed
from drift_jax.distributed import Processes, gather, on_each, on_main, send_bytes, start_processes
from drift_jax.errors import ConfigError, StageError
from drift_jax.stages.journal import open_journals
from tests.processes import run_together


@pytest.mark.slow
def test_processes_exchange_what_they_have() -> None:
    ends = run_together("tests.exchange", 3, devices=1)
    assert [code for code, _ in ends] == [0] * 3, ends
    found = [json.loads(output.splitlines()[-1]) for _, output in ends]
    for me, own in enumerate(found):
        assert own["gather"] == [{"process": i, "text": "é" * i} for i in range(3)]
        assert own["bytes"] == [0, 5000, 10000] and own["large"]
        assert own["sent"] == "b'from process 0'" and own["nothing"] is None
        assert own["on_main"] == "[0, 'main']" and own["on_each"] == str(me)
        assert own["main fails"] == ("DataError" if me == 0 else "PeerError") + ": row 0 is bad"
        assert own["1 fails"] == ("DataError: row 1 is bad" if me == 1 else "PeerError: process 1: row 1 is bad")
        assert own["all fail"] == ("DataError" if me == 0 else "PeerError") + ": no such file"


def test_one_process_asks_nobody() -> None:
    assert gather([1, "x"]) == [[1, "x"]]
    assert on_main(lambda: Path("x")) == Path("x") and on_each(lambda: 3) == 3
    assert send_bytes(lambda: None) is None and send_bytes(lambda: b"x") == b"x"
    with pytest.raises(StageError):
        on_main(lambda: (_ for _ in ()).throw(StageError("x")))


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, False),  # in a script of sbatch, outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_the_cluster_says_whether_there_are_others(
    environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    start_processes(Processes(), environment)
    assert bool(started) == several
    start_processes(Processes("off"), environment)
    assert len(started) == several
    start_processes(Processes("auto", "host:1", 2, 0), {})
    assert started[-1] == ("host:1", 2, 0)


def test_a_cluster_without_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: 1 of 2 came")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(ConfigError, match=r"1 of 2 came.*same command on every host"):
        start_processes(Processes("on"), {})


def test_a_peer_that_is_gone_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout")
    assert not distributed.is_lost_peer(lost)  # there is no other process
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.is_lost_peer(lost)
    assert not distributed.is_lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not distributed.is_lost_peer(ConnectionError("the tracker's server: UNAVAILABLE"))
    assert not distributed.is_lost_peer(StageError("Barrier"))


# --- journals -----------------------------------------------------------------------------------------------


def as_process(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: index)


def rows(*names: str) -> list[dict[str, object]]:
    rest = {"sample": 0, "token_ids": [1], "finish_reason": "stop"}
    return [{"id": name, "text": f"of {name} \u2028", **rest} for name in names]


def test_what_more_processes_have_left_is_found_by_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four wrote, one of them was killed in a row; two go on: nothing is lost and nothing is there twice."""
    for index in range(4):
        as_process(monkeypatch, index)
        with open_journals(tmp_path, 4) as journals:
            journals.append(rows(f"a{index}", f"b{index}"))
    with (tmp_path / "completions.partial.3.jsonl").open("a") as file:
        file.write('{"id": "torn')
    found = {}
    for index in (1, 0):
        as_process(monkeypatch, index)
        with open_journals(tmp_path, 2) as journals:
            found[index] = {key[0] for key in journals.rows}
            assert all(row["text"] == f"of {row['id']} \u2028" for row in journals.rows.values())
    assert found == {0: {"a0", "b0", "a2", "b2", "a3", "b3"}, 1: {"a1", "b1"}}


def test_what_was_merged_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was stopped after the journals were removed and before the stage counted as finished."""
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("a", "b")))
    for index, known in ((0, {"a", "b"}), (1, set())):
        as_process(monkeypatch, index)
        with open_journals(tmp_path, 2) as journals:
            assert {key[0] for key in journals.rows} == known


def test_journals_go_when_the_work_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of processes that only an earlier run had; one that is to write none has none."""
    for index in (2, 0):
        as_process(monkeypatch, index)
        with open_journals(tmp_path, 3) as journals:
            journals.append(rows(f"a{index}"))
    as_process(monkeypatch, 1)
    with open_journals(tmp_path, 1) as journals:
        journals.append(rows("x"))
        assert not journals.rows
        journals.remove()
    assert len(list(tmp_path.iterdir())) == 2
    as_process(monkeypatch, 0)
    with open_journals(tmp_path, 1) as journals:
        assert {key[0] for key in journals.rows} == {"a0", "a2"}
        journals.remove()
    assert not list(tmp_path.iterdir())
