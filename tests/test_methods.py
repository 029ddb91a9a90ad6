"""Where both replies of a pair come from, by method: which records, which prompts, which policy, which side."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from drift_jax.config import RunConfig, build_config
from drift_jax.data.pairs import tokenize_pair
from drift_jax.data.prompts import IMPROVE_INSTRUCTION
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.errors import ConfigError, DataError, StageError
from drift_jax.manifest import Manifest
from drift_jax.methods import Method, load_method, method_names
from drift_jax.records import Message, Pair, read_pairs
from drift_jax.stages.identity import sample_identity, sampling_job
from drift_jax.stages.inputs import load_split, records_path
from drift_jax.stages.pair import check_choosing, pair_stage
from drift_jax.stages.rank import ranker_source
from drift_jax.stages.sample import _build_requests, sample_stage
from tests.http_servers import serve
from tests.tiny import build_tiny_tokenizer
from tests.tiny_pairs import build_tiny_policy, write_dsat

POLICY = "b" * 64
LOGGED = {"dsat": "Number {} was the best of all numbers.", "sat": "A story that was liked, of number {}."}
# method: records, styles of its prompts, where chosen and rejected come from
EXPECTED = {
    "drift": ("dsat", ["chat"], "policy", "dsat"),
    "drift-unguided": ("dsat", ["unguided"], "policy", "dsat"),
    "spin": ("sat", ["unguided"], "sat", "policy"),
    "iterdpo": ("dsat", ["unguided", "chat"], "policy", "policy"),
}
METHODS = pytest.mark.parametrize("method", EXPECTED)


def write_sat(path: Path, count: int) -> Path:
    """SAT records as `drift mine` writes them."""
    rows = [
        {
            "id": f"d{i}",
            "prompt": [{"role": "user", "content": f"Tell me a story about number {i}."}],
            "chosen": [{"role": "assistant", "content": LOGGED["sat"].format(i)}],
            "user_preference": {"role": "user", "content": "Thank you, that is what I wanted."},
            "meta": {"conversation": f"c{i}", "split": "test" if i == 0 else "train", "evidence": {}},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: Path, method: str, **sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"dsat": str(folder / "dsat.jsonl"), "sat": str(folder / "sat.jsonl"), "test_rows": 1},
        "recipe": {"method": method},
        "sampling": {
            "max_new_tokens": 8,
            "max_input_length": 128,
            "other_speakers": "keep",
            "compute_dtype": "float32",
        },
    }
    for section, keys in sections.items():
        raw[section] = raw.get(section, {}) | keys
    return build_config(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_dsat(folder / "dsat.jsonl", 4)
    write_sat(folder / "sat.jsonl", 4)
    build_tiny_tokenizer(folder / "tokenizer")
    return folder


def reply(name: str, sample: int, text: str | None = None, **more: Any) -> dict[str, Any]:
    text = f"Reply {sample} to {name}, {'abcdefgh'[sample] * 40}" if text is None else text
    row = {"id": name, "sample": sample, "text": text, "token_ids": [10 + sample, 11], "finish_reason": "length"}
    return row | {"mean_logp": -1.0 - sample} | more


def pair_up(folder: Path, config: RunConfig, rows: list[dict[str, Any]], out: Path) -> tuple[dict[str, Pair], dict]:
    """(pairs by id, summary)"""
    out.mkdir(exist_ok=True)
    (out / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = pair_stage(config, POLICY, str(records_path(config)), out, Console(file=io.StringIO()))
    files = [out / f"pairs.{name}.jsonl" for name in ("test", "train")]
    return {pair.id: pair for file in files if file.read_text() for pair in read_pairs(file).records}, summary


def draws(config: RunConfig, per_prompt: int = 1) -> list[dict[str, Any]]:
    samples = per_prompt * len(load_method(config.recipe.method, "chat").draws)
    return [reply(f"d{i}", sample) for i in range(4) for sample in range(samples)]


def test_every_method_is_tried_here() -> None:
    assert method_names() == tuple(sorted(EXPECTED))


@METHODS
def test_both_sides_come_from_where_the_method_says(folder: Path, tmp_path: Path, method: str) -> None:
    """Texts, ids, and what `meta` says of them: the policy's hash, or the file of the logged side."""
    kind, styles, *sources = EXPECTED[method]
    config = config_of(folder, method)
    pairs, summary = pair_up(folder, config, draws(config), tmp_path / "out")
    assert (summary["pairs"], summary["held_out"], len(pairs)) == (3, 1, 4)
    records = hashlib.sha256((folder / f"{kind}.jsonl").read_bytes()).hexdigest()
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, pair in pairs.items():
        # Whatever was shown to the sampler: the complaint, and the reply that it is about, are no part of the pair.
        assert pair.prompt == (Message("user", f"Tell me a story about number {name[1:]}."),)
        assert pair.meta["method"] == method and pair.meta["sampling"]["style"] == " + ".join(styles)
        ids = tokenize_pair(pair, tokenizer, 64, 128)
        for side, source in zip(("chosen", "rejected"), sources, strict=True):
            found, text = pair.meta[f"{side}_from"], getattr(pair, side)
            if source == "policy":
                sample = pair.meta["sample" if side == "chosen" else "rejected_sample"]
                assert text == reply(name, sample)["text"]
                assert (found["sha256"], found["style"]) == (POLICY, styles[sample])
                assert pair.meta[f"{side}_token_ids"] == getattr(ids, f"{side}_ids").tolist() == [10 + sample, 11]
            else:
                assert text == LOGGED[kind].format(name[1:])
                assert found == {"source": kind, "sha256": records, "id": name}
                assert f"{side}_token_ids" not in pair.meta


@METHODS
def test_prompts_are_those_of_the_method(folder: Path, method: str) -> None:
    """Guided ones show the complaint and the request to improve, others the dialogue alone; n samples of each."""
    config = config_of(folder, method, sampling={"n": 2, "max_input_length": 512})
    tokenizer = load_tokenizer(folder / "tokenizer")
    split = load_split(config, str(records_path(config)))
    requests, cuts, refused = _build_requests(config, split.train, tokenizer)
    styles = EXPECTED[method][1]
    assert (len(requests), len(cuts), refused) == (3 * 2 * len(styles), 3 * len(styles), [])
    for request in requests:
        text = tokenizer.decode(request.prompt_ids)
        guided = styles[request.sample // 2] == "chat"
        assert (IMPROVE_INSTRUCTION in text) == ("That is too short" in text) == guided
        assert f"about number {request.row_id[1:]}." in text and "Thank you, that is" not in text


def test_iterdpo_takes_the_better_one_as_chosen(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "iterdpo", sampling={"n": 2, "chooser": "logprob"})
    rows = [
        reply(f"d{i}", s, mean_logp=[-3.0, -2.0, -1.5, -9.0][s] - 2.0 * (i == 2 and s > 1))
        for i in range(4)
        for s in range(4)
    ]
    pairs, _ = pair_up(folder, config, rows, tmp_path / "out")
    samples = {name: (pair.meta["sample"], pair.meta["rejected_sample"]) for name, pair in pairs.items()}
    assert samples == {"d0": (2, 1), "d1": (2, 1), "d2": (1, 2), "d3": (2, 1)}
    assert pairs["d1"].meta["ranker"] == {"name": "logprob", "samples": [1, 2], "mean_logp": [-2.0, -1.5]}
    assert pairs["d1"].meta["chosen_from"]["as"] == "best" and pairs["d1"].meta["rejected_from"]["as"] == "worst"


def test_where_neither_is_better_there_is_no_pair_and_a_count(folder: Path, tmp_path: Path) -> None:
    rows = draws(config_of(folder, "iterdpo"))
    rows[2]["text"] = rows[3]["text"]  # d1: both alike
    rows[4]["mean_logp"] = rows[5]["mean_logp"]  # d2: ranked alike
    pairs, summary = pair_up(folder, config_of(folder, "iterdpo"), rows, tmp_path / "out")
    assert set(pairs) == {"d0", "d3"}
    assert summary["drops"]["both replies alike"] == summary["drops"]["ranked alike"] == 1
    reasons = {row["id"]: row["reason"] for row in json.loads((tmp_path / "out/drops.json").read_text())["records"]}
    assert reasons == {"d1": "both replies alike", "d2": "ranked alike"}
    with pytest.raises(DataError, match=r"no pair is left to train on: 4 ranked alike"):
        pair_up(
            folder,
            config_of(folder, "iterdpo"),
            [row | {"mean_logp": -1.0} for row in draws(config_of(folder, "iterdpo"))],
            tmp_path / "b",
        )


def test_a_draw_like_the_logged_reply_is_no_other_side(folder: Path, tmp_path: Path) -> None:
    """For SPIN the logged one is the chosen one; IterDPO has no logged side, so that there it may be said again."""
    for method, reason in (("drift", "same as rejected"), ("spin", "same as chosen"), ("iterdpo", None)):
        config = config_of(folder, method)
        rows = draws(config)
        rows[-1]["text"] = LOGGED[EXPECTED[method][0]].format(3)
        pairs, summary = pair_up(folder, config, rows, tmp_path / method)
        assert ("d3" in pairs) == (reason is None)
        assert summary["drops"].get(reason, 0) == (reason is not None)


# --- rankers --------------------------------------------------------------------------------------------------


@pytest.fixture()
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, which Python finds."""
    path = tmp_path / "own_ranker.py"
    path.write_text(
        "def shortest(record, reply):\n    return -len(reply)\n\n\n"
        "def wrong(record, reply):\n    return record.user_preference.nothing\n\n\n"
        "def nan(record, reply):\n    return float('nan')\n\n\nword = 'a'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_ranker", raising=False)
    return path


def test_a_function_ranks(folder: Path, tmp_path: Path, own_module: Path) -> None:
    config = config_of(folder, "iterdpo", recipe={"ranker": "own_ranker:shortest"})
    check_choosing(config)
    rows = [reply(f"d{i}", s, text="a" * (40 + 30 * (s == i % 2))) for i in range(4) for s in range(2)]
    pairs, _ = pair_up(folder, config, rows, tmp_path / "out")
    assert [pairs[f"d{i}"].meta["sample"] for i in range(4)] == [1, 0, 1, 0]
    assert pairs["d0"].meta["ranker"]["scores"] == [-70.0, -40.0]
    assert ranker_source("own_ranker:shortest") == own_module and ranker_source("judge") is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_ranker:nothing", ConfigError, "there is no function own_ranker:nothing"),
        ("no_such_module:f", ConfigError, "PYTHONPATH"),
        ("own_ranker:word", ConfigError, "is no function but 'a'"),
        ("own_ranker:wrong", StageError, "failed on record d0: AttributeError"),
        ("own_ranker:nan", StageError, "gave nan for record d0"),
    ],
)
def test_a_function_that_cannot_rank_is_named(
    folder: Path, tmp_path: Path, own_module: Path, name: str, error: type[Exception], message: str
) -> None:
    config = config_of(folder, "iterdpo", recipe={"ranker": name})
    with pytest.raises(error, match=message):
        check_choosing(config)
        pair_up(folder, config, draws(config), tmp_path / "out")


def test_a_judge_ranks_in_whatever_order_it_is_shown(folder: Path, tmp_path: Path) -> None:
    """It likes replies of sample 1; asked about d2 it says nothing that can be used: no pair, instead of any."""

    def answer(path: str, body: Any) -> tuple[int, Any]:
        prompt = body["messages"][0]["content"]
        best = int(prompt[: prompt.index("Reply 1 to")].rpartition("<reply_")[2].split(">")[0])
        said = "No." if "number 2." in prompt else json.dumps({"reason": "", "best": best})
        return 200, {"choices": [{"message": {"content": said}}]}

    with serve(answer) as server:
        judge = {"base_url": server.url, "model": "j"}
        config = config_of(folder, "iterdpo", recipe={"ranker": "judge"}, judge=judge)
        pairs, summary = pair_up(folder, config, draws(config), tmp_path / "out")
    assert set(pairs) == {"d0", "d1", "d3"} and {pair.meta["sample"] for pair in pairs.values()} == {1}
    assert summary["judge_failures"] == summary["drops"]["no verdict"] == 1
    assert pairs["d0"].meta["ranker"]["model"] == "j"


# --- configs and manifests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ("dpo", {}, r"recipe\.method must be one of drift, drift-unguided, iterdpo, spin, found 'dpo'"),
        ("iterdpo", {"recipe": {"ranker": "best one"}}, r"logprob, judge or MODULE:FUNCTION, found 'best one'"),
        ("iterdpo", {"recipe": {"ranker": "judge"}}, r"recipe\.ranker is judge: name its server"),
        (
            "spin",
            {"sampling": {"n": 2, "chooser": "judge"}, "judge": {"base_url": "http://u", "model": "m"}},
            "complaint",
        ),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, method: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(folder, "drift", **({"recipe": {"method": method} | sections.pop("recipe", {})} | sections))


def test_the_records_of_the_method_must_be_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sat is empty: method spin needs a JSONL file of SAT records"):
        records_path(config_of(folder, "spin", data={"sat": ""}))
    assert records_path(config_of(folder, "drift", data={"sat": ""})).name == "dsat.jsonl"


@pytest.mark.parametrize(
    "wrong",
    [
        {"chosen": "logged", "rejected": "logged"},
        {"chosen": "worst", "rejected": "best", "draws": ("chat", "chat")},
        {"chosen": "best", "rejected": "worst"},
        {"records": "sat"},
    ],
    ids=str,
)
def test_a_method_that_makes_no_pair_is_refused(wrong: dict[str, Any]) -> None:
    right = {"records": "dsat", "draws": ("chat",), "chosen": "drawn", "rejected": "logged"}
    assert Method(**right).logged == "rejected"
    with pytest.raises(ValueError):
        Method(**(right | wrong))


def test_a_new_method_is_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logged DSAT reply as the chosen one, for a test's sake."""
    module = ModuleType("drift_jax.methods.backwards")
    module.sides = lambda style: Method("dsat", (style,), "logged", "drawn")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("drift_jax.config.method_names", lambda: ("backwards",))
    pairs, _ = pair_up(folder, config := config_of(folder, "backwards"), draws_of(4), tmp_path / "out")
    assert config.recipe.method == "backwards" and len(pairs) == 4
    assert {pair.meta["chosen_from"]["source"] for pair in pairs.values()} == {"dsat"}


def draws_of(records: int) -> list[dict[str, Any]]:
    return [reply(f"d{i}", 0) for i in range(records)]


def test_a_stage_of_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    """Entries from before there were methods are those of drift."""
    model = folder / "tokenizer"
    manifest = Manifest(tmp_path)

    def enter(method: str, name: str = "iter_1/sample", **sections: Any) -> bool:
        config = config_of(folder, method, **sections)
        return manifest.enter(name, *sample_identity(config, manifest, model, records_path(config)))

    assert not enter("drift")
    manifest.finish("iter_1/sample", {})
    assert enter("drift")
    entry = manifest._data["stages"]["iter_1/sample"]
    del entry["config"]["recipe.method"]
    assert enter("drift")
    for method in ("spin", "iterdpo", "drift-unguided"):
        with pytest.raises(StageError, match=f'recipe.method: was "drift", is now "{method}"'):
            enter(method)
    assert not enter("iterdpo", "other")
    with pytest.raises(StageError, match=r'recipe\.ranker: was "logprob", is now "judge"'):
        enter("iterdpo", "other", recipe={"ranker": "judge"}, judge={"base_url": "http://u/v1", "model": "m"})


def test_completions_of_before_are_still_those_of_drift(folder: Path, tmp_path: Path) -> None:
    """The job of completions that were drawn before there were methods: `drift sample` goes on with them."""
    inputs, model = {"dsat": "d", "policy": "p"}, build_tiny_tokenizer(tmp_path / "model", vocab_size=512)
    jobs = {name: sampling_job(config_of(folder, name), inputs, model) for name in EXPECTED}
    assert jobs["drift"] == "878aa34c26ca1f66412dffc587747e09da504d6490845fb88bc7cbcf83e8ed3e"
    assert len(set(jobs.values())) == 3 and jobs["spin"] == jobs["drift-unguided"]


# --- with a policy --------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Of each method, sampled and paired twice; the policy's hash is that of its files."""
    model = build_tiny_policy(tmp_path / "model", tied=True)
    seen: dict[str, set[bytes]] = {}
    cut: dict[str, int] = {}
    for method in EXPECTED:
        for run in ("a", "b"):
            config = config_of(folder, method, mesh={"data": 2, "fsdp": 2, "tensor": 2})
            out = tmp_path / method / run
            out.mkdir(parents=True)
            records = records_path(config)
            _, inputs = sample_identity(config, Manifest(out), model, records)
            quiet = Console(file=io.StringIO(), width=200)
            summary = sample_stage(config, model, str(records), out, quiet, sampling_job(config, inputs, model))
            assert (said := quiet.file.getvalue()).count("lose their beginning") == (summary["prompts_cut"] > 0)
            assert f"{summary['prompts_cut']} of " in said or not summary["prompts_cut"]
            cut[method] = summary["prompts_cut"]
            pair_stage(config, inputs["policy"], str(records), out, quiet)
            seen.setdefault(method, set()).add((out / "pairs.train.jsonl").read_bytes())
        (data,) = seen[method]
        row = json.loads(data.splitlines()[0])
        drawn = [side for side in ("chosen", "rejected") if row["meta"][f"{side}_from"]["source"] == "policy"]
        assert drawn and all(
            row["meta"][f"{side}_from"]["sha256"] == Manifest(tmp_path).model_hash(model) for side in drawn
        )
    assert len(set.union(*seen.values())) == 4
    assert cut["drift"] == 4 and cut["spin"] == 0, (
        "prompts with the complaint are longer than sampling.max_input_length"
    )
