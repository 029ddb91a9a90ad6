"""The functions behind the commands that read a file, by the kind of the corpus whose files they read."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from drift_jax import judging
from drift_jax.checkpoint import CHECKSUMS_FILE, find_damage, seal
from drift_jax.config import load_config
from drift_jax.data.exchange import convert_pairs
from drift_jax.data.inspection import inspect_file
from drift_jax.data.mining import logs, ultrafeedback, wildfeedback
from drift_jax.data.mining.complaint_rules import load_rules
from drift_jax.data.mining.config import ModerationRules, UltraFeedbackRules, WildFeedbackRules, load_mining_config
from drift_jax.data.mining.judged import _Answer as MinedAnswer
from drift_jax.data.mining.sources import BadRows, SourceReader, find_sources
from drift_jax.data.mixer import load_mixture
from drift_jax.data.pairs import TokenizedPair
from drift_jax.data.tables import check_table
from drift_jax.data.token_cache import read_lengths, read_tokens
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.evaluation.alpaca_eval import check_prompts, read_annotator, win_rates
from drift_jax.evaluation.coverage_settings import load_settings
from drift_jax.evaluation.json_rows import read_json
from drift_jax.evaluation.prompts import Prompt, read_outputs, read_prompts
from drift_jax.evaluation.replies import read_replies
from drift_jax.evaluation.results import read_results
from drift_jax.evaluation.wildbench_files import recompute
from drift_jax.evaluation.wildbench_judge import load_outputs
from drift_jax.evaluation.wildbench_rows import load_tasks
from drift_jax.handbook import DatasetMixture, DatasetPart, translate_handbook
from drift_jax.journal import read_rows
from drift_jax.judge import parse_object
from drift_jax.manifest import Manifest
from drift_jax.models.architecture import load_hf_config, qwen_config_from_hf
from drift_jax.models.hf import check_weights
from drift_jax.models.safetensors_file import check_header
from drift_jax.reading import read_text
from drift_jax.records import Message, read_dsat, read_pairs, read_sat
from drift_jax.report import forms
from drift_jax.report.runs import load_run, read_json_file
from drift_jax.stages.choose import _Verdict as Choice
from drift_jax.stages.journal import read_completions
from drift_jax.stages.reference import RefJournal, journal_path, read_ref_logps
from drift_jax.telemetry import read_metrics
from tests.tiny_pairs import build_tiny_policy

Parse = Callable[[Path], Any]


def _mined(log_format: str, path: Path) -> None:
    """All rows of a log, as `drift mine --on-bad-row skip` reads them."""
    bad = BadRows("skip")
    for source in find_sources([str(path)]):
        if log_format == "wildfeedback":
            reader: Any = wildfeedback.LabelledConversations(WildFeedbackRules(), ModerationRules()).mine
            columns = wildfeedback.COLUMNS
        elif log_format == "ultrafeedback":
            reader, columns = ultrafeedback.ScoredPrompts(UltraFeedbackRules()).mine, ("instruction", "completions")
        else:
            reader, columns = logs.Conversations(log_format, ModerationRules()).read, logs.columns(log_format)
        for _ in reader(source.name, SourceReader(source, columns, lambda _: None), bad.add):
            pass


def _in_folder(name: str, read: Parse) -> Parse:
    """For what is read by the name of its directory."""

    def parse(path: Path) -> Any:
        folder = path.with_name("folder")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
        return read(folder)

    return parse


@functools.cache
def _model_folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    build_tiny_policy(Path(folder.name), num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    return folder


def tiny_model() -> Path:
    """A model of this process, to be copied from."""
    return Path(_model_folder().name)


def _in_model(name: str, read: Parse) -> Parse:
    """For a file of a model's directory, the others being whole."""

    def parse(path: Path) -> Any:
        folder = path.with_name("model")
        if not folder.exists():
            shutil.copytree(tiny_model(), folder)
        (folder / name).write_bytes(path.read_bytes())
        return read(folder)

    return parse


def _is_undamaged(path: Path) -> Any:
    """`path` for the checksums of a checkpoint of one file."""
    folder = path.with_name("checkpoint")
    if not folder.exists():
        (folder / "params").mkdir(parents=True)
        (folder / "params" / "data").write_bytes(b"weights")
        seal(folder)
    (folder / CHECKSUMS_FILE).write_bytes(path.read_bytes())
    return find_damage(folder)


PROMPTS = [Prompt(f"p{i}", (Message("user", f"Say {i}."),), {}) for i in range(4)]
TOKENS_KEY = "0" * 64
PAIRS = [TokenizedPair(f"p{i}", *(np.full(i + 2, i, np.int32) for _ in range(3))) for i in range(2)]


def _journalled_logps(path: Path) -> Any:
    """A reference pass that was ended, of two pairs."""
    folder = path.with_name("pass")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, journal_path(folder / "ref_logps.npz"))
    with RefJournal(folder, PAIRS) as journal:
        return journal.part(0, len(PAIRS))


def _mixed(path: Path) -> Any:
    """`path` for the only split of a dataset of a handbook file."""
    folder = path.with_name("dataset")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / "train.jsonl")
    mixture = DatasetMixture((DatasetPart(str(folder), "train"),))
    return load_mixture(mixture, path.with_name("mixed"))


def _converted(path: Path) -> Any:
    out = path.with_name("converted")
    shutil.rmtree(out, ignore_errors=True)
    return convert_pairs(path, out, "handbook")


def _reported(path: Path) -> Any:
    """`path` for the config of a run that has made nothing yet."""
    folder = path.with_name("run")
    if not folder.exists():
        Manifest(folder).enter("seed/train", {}, {})
    (folder / "config.yaml").write_bytes(path.read_bytes())
    return load_run(folder)


def _judged(path: Path) -> Any:
    try:
        return parse_object(path.read_bytes().decode("utf-8", "replace"))
    except ValueError:
        return None  # what `Judge` takes for an answer that cannot be used


PARSERS: dict[str, tuple[str, Parse]] = {
    "dsat": (".jsonl", read_dsat),
    "sat": (".jsonl", read_sat),
    "pairs": (".jsonl", read_pairs),
    "inspect_json": (".json", inspect_file),
    "inspect_completions": (".jsonl", inspect_file),
    "config": (".yaml", load_config),
    "handbook": (".yaml", partial(translate_handbook, devices=2)),
    "rules": (".yaml", load_rules),
    "mining_config": (".yaml", load_mining_config),
    "coverage_settings": (".yaml", load_settings),
    "model_config": (".json", _in_folder("config.json", lambda folder: qwen_config_from_hf(load_hf_config(folder)))),
    "safetensors": (".safetensors", check_header),
    "manifest": (".json", _in_folder("manifest.json", Manifest)),
    "metrics": (".jsonl", read_metrics),
    "eval_json": (".json", _in_folder("iter_1/eval.json", partial(read_results, "m"))),
    "report_json": (".json", _in_folder("evaluation/report.json", partial(read_results, "m"))),
    "scores": (".jsonl", partial(read_rows, form=forms.Score)),
    "drops": (".json", lambda path: read_json_file(path, {}, forms.Drops)),
    "showcase": (".json", lambda path: read_json_file(path, [], list[forms.Answer])),
    "completions": (".jsonl", read_completions),
    "prompts": (".jsonl", read_prompts),
    "outputs": (".json", lambda path: read_outputs(path, PROMPTS)),
    "replies": (".jsonl", lambda path: read_replies("m", path, {})),
    "wildbench_rows": (".json", lambda path: recompute([path], None, None, 500)),
    "wildbench_tasks": (".json", load_tasks),
    "wildbench_outputs": (".json", load_outputs),
    "wildbench_template": (".md", read_text),
    "alpaca_rows": (".json", lambda path: win_rates(read_json(path, "rows"))),
    "judge_answer": (".http", _judged),
    "log_jsonl": (".jsonl", partial(_mined, "messages")),
    "log_json": (".json", partial(_mined, "messages")),
    "log_csv": (".csv", partial(_mined, "wildchat")),
    "log_wildfeedback": (".jsonl", partial(_mined, "wildfeedback")),
    "log_sharegpt": (".jsonl", partial(_mined, "sharegpt")),
    "log_ultrafeedback": (".jsonl", partial(_mined, "ultrafeedback")),
    "log_gz": (".jsonl.gz", partial(_mined, "messages")),
    "log_parquet": (".parquet", partial(_mined, "messages")),
    "safetensors_index": (".json", _in_model("model.safetensors.index.json", check_weights)),
    "tokenizer": (".json", _in_model("tokenizer.json", load_tokenizer)),
    "tokenizer_config": (".json", _in_model("tokenizer_config.json", load_tokenizer)),
    "generation_config": (".json", _in_model("generation_config.json", load_tokenizer)),
    "chat_template": (".jinja", _in_model("chat_template.jinja", load_tokenizer)),
    "checksums": (".json", _is_undamaged),
    "ref_logps": (".npz", lambda path: read_ref_logps(path, PAIRS)),
    "ref_journal": (".jsonl", _journalled_logps),
    "tokens": (".npz", lambda path: (read_lengths(path), read_tokens(path, TOKENS_KEY))),
    "mining_journal": (".jsonl", partial(read_rows, torn=True, form=MinedAnswer)),
    "verdicts": (".jsonl", partial(read_rows, torn=True, form=judging._Row)),
    "choices": (".jsonl", partial(read_rows, torn=True, form=Choice)),
    "run_config": (".yaml", _reported),
    "alpaca_baseline": (".json", lambda path: check_prompts(read_json(path, "rows"), "rows")),
    "annotator": (".yaml", _in_folder("configs.yaml", lambda folder: read_annotator(folder, "mine"))),
    "disk_dataset": (".json", _in_folder("state.json", check_table)),
    "mixture": (".jsonl", _mixed),
    "convert": (".jsonl", _converted),
}
