"""The functions behind the commands that read a file, by the kind of the corpus whose files they read."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from drift_jax.config import load_config
from drift_jax.data.inspection import inspect_file
from drift_jax.data.mining import logs, ultrafeedback, wildfeedback
from drift_jax.data.mining.complaint_rules import load_rules
from drift_jax.data.mining.config import ModerationRules, UltraFeedbackRules, WildFeedbackRules, load_mining_config
from drift_jax.data.mining.sources import BadRows, SourceReader, find_sources
from drift_jax.evaluation.alpaca_eval import win_rates
from drift_jax.evaluation.coverage_settings import load_settings
from drift_jax.evaluation.json_rows import read_json
from drift_jax.evaluation.prompts import read_outputs, read_prompts
from drift_jax.evaluation.replies import read_replies
from drift_jax.evaluation.results import read_results
from drift_jax.evaluation.wildbench_files import recompute
from drift_jax.evaluation.wildbench_judge import load_outputs
from drift_jax.evaluation.wildbench_rows import load_tasks
from drift_jax.handbook import translate_handbook
from drift_jax.journal import read_rows
from drift_jax.judge import parse_object
from drift_jax.manifest import Manifest
from drift_jax.models.architecture import load_hf_config, qwen_config_from_hf
from drift_jax.models.safetensors_file import check_header
from drift_jax.reading import read_text
from drift_jax.records import read_dsat, read_pairs, read_sat
from drift_jax.report import forms
from drift_jax.report.runs import read_json_file
from drift_jax.stages.journal import read_completions
from drift_jax.telemetry import read_metrics
from tests.bad_input import odd
from tests.bad_input.corpus import FOLDER

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
    "outputs": (".json", lambda path: read_outputs(path, [])),
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
}

_PIECES = (b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b'"\\ud800"', b"9" * 5000, b"\xff", b"\0", b"*a")
_MARKS = b'{}[]",:\n'


def seeds_of(kind: str, folder: Path) -> list[bytes]:
    """The files of a kind of the corpus, made ones included, valid ones first and again and again; what is no file is
    left out.
    """
    given = [path for path in sorted((FOLDER / kind).iterdir()) if path.name != "cases.yaml"]
    good = [path.read_bytes() for path in given if path.stem == "good"]
    found = good * len(given) + [path.read_bytes() for path in given]
    for name, make in odd.MAKERS.items():
        path = folder / "seed"
        if name.startswith(f"{kind}/"):
            with contextlib.suppress(OSError):  # one that changes a file beside it
                make(path)
            if path.is_file() and not path.is_symlink():
                found.append(path.read_bytes())
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
    return found


def damaged(data: bytes, source: random.Random) -> bytes:
    """The bytes after one to three mishaps."""
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        at, end = sorted(source.randint(0, len(data)) for _ in range(2))
        kind = source.randrange(6)
        if kind == 0:  # cut off
            data = data[:at]
        elif kind == 1:  # a piece is lost, or doubled
            data = data[:at] + data[end:] if source.random() < 0.5 else data[:end] + data[at:]
        elif kind == 2 and data:  # a byte is another one
            data = data[: max(0, at - 1)] + bytes([source.randrange(256)]) + data[at:]
        elif kind == 3:  # another value in the place of one
            marks = [i for i, byte in enumerate(data) if byte in _MARKS] or [0]
            first = source.choice(marks)
            last = next((i for i in marks if i > first), len(data))
            data = data[: first + 1] + source.choice(_PIECES) + data[last:]
        elif kind == 4:  # many times the same
            data = data[:at] + data[at : at + 20] * source.randint(2, 200) + data[at:]
        else:
            data = data[:at] + source.choice(_PIECES) + data[at:]
    return data
