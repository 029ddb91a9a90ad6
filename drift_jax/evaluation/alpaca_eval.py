"""AlpacaEval 2 (github.com/tatsu-lab/alpaca_eval): win rates of annotations, and annotating with the package itself.

Win rates are recomputed here without the package, by its definitions. A preference is 1 + P(the model wins):

1. A 0 is a draw, 1.5. What is null or outside [1, 2] is dropped.
2. `win_rate` is 100 times the mean of preference - 1, `standard_error` that of the mean (ddof 1).
3. `discrete_win_rate` rounds first, half to even: 1 and 2 are losses and wins, exactly 1.5 is half a win. What rounds
   to 0 is a draw as well, so that a preference of 0.4 is dropped above and a draw here, as in the package.
4. `avg_length` is the mean length of the model's outputs in characters, cut to a whole number; those of dropped rows
   count, an output that is null does not.

The length-controlled win rate is the package's: it needs `df_gamed.csv` of the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field
from typing_extensions import TypedDict

from drift_jax.config import JudgeConfig
from drift_jax.endpoint import read_api_key
from drift_jax.errors import DataError, StageError
from drift_jax.evaluation.alpaca_length import BASELINE, LC_MISSING, hub_file, length_controlled
from drift_jax.evaluation.intervals import score_interval
from drift_jax.evaluation.report import Report, Section, number, with_interval
from drift_jax.files import atomic_writer, write_json
from drift_jax.reading import check_form, read_text
from drift_jax.yaml_files import read_yaml

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # of the published table of AlpacaEval 2


def win_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of the published table, from annotations or slimmed rows (`preference`, `len_2`).

    `standard_error` is None for one row. `dropped`: rows without a usable preference.

    Raises:
      DataError: no row has a usable preference.
    """
    preferences = [_preference(row.get("preference")) for row in rows]
    drawn = [1.5 if value == 0 else value for value in preferences if value is not None]
    kept = [value - 1 for value in drawn if 1 <= value <= 2]
    if not kept:
        raise DataError(f"none of {len(rows)} rows has a preference from 1 to 2: there is nothing to compute.")
    rounded = [1.5 if round_half(value) == 0 else round_half(value) for value in drawn]
    discrete = [value - 1 for value in rounded if 1 <= value <= 2]
    mean = sum(kept) / len(kept)
    lengths = [length for length in map(_length, rows) if length is not None]
    interval = score_interval(kept)
    return {
        "win_rate": 100 * mean,
        "standard_error": _standard_error(kept, mean),
        "n_wins": sum(value > 0.5 for value in kept),
        "n_wins_base": sum(value < 0.5 for value in kept),
        "n_draws": sum(value == 1.5 for value in drawn),
        "n_total": len(kept),
        "discrete_win_rate": 100 * sum(discrete) / len(discrete),
        "avg_length": int(sum(lengths) / len(lengths)) if lengths else None,
        "length_controlled_winrate": LC_MISSING,
        "win_rate_interval": None if interval is None else [100 * end for end in interval],
        "dropped": len(rows) - len(kept),
    }


def round_half(value: float) -> float:
    """To a whole number, half to even; exactly 1.5 is a draw, 0."""
    return 0.0 if value == 1.5 else float(round(value))


def _preference(value: Any) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _standard_error(values: Sequence[float], mean: float) -> float | None:
    """Of the mean, x100."""
    if len(values) < 2:
        return None
    return 100 * math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _length(row: Mapping[str, Any]) -> float | None:
    if isinstance(row.get("output_2"), str):
        return len(row["output_2"])
    return _preference(row.get("len_2"))


def build_outputs(prompts: Sequence[Mapping[str, Any]], outputs: Sequence[str], model: str) -> list[dict[str, Any]]:
    """Rows of `model_outputs.json`, in the order of the prompts."""
    return [
        {
            "dataset": prompt.get("dataset", "alpaca_eval"),
            "instruction": prompt["instruction"],
            "output": output,
            "generator": model,
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def model_of_outputs(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """What `generator` says, or the name of the file. Raises `DataError` for outputs of several models."""
    found = sorted({str(row["generator"]) for row in rows if row.get("generator")})
    if len(found) > 1:
        raise DataError(
            f"{path} holds outputs of several models: {', '.join(found[:20])}. Keep those of one in a file."
        )
    return found[0] if found else path.stem


def check_prompts(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Raises `DataError` unless every row has an instruction."""
    bad = [i for i, row in enumerate(rows, 1) if not isinstance(row.get("instruction"), str)]
    if bad:
        raise DataError(f"{source}: rows {', '.join(map(str, bad[:20]))} have no instruction.")


def match_outputs(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]], source: str
) -> dict[str, Any]:
    """How many prompts there are, how many have no output, and how many outputs belong to no prompt.

    Raises:
      DataError: an output has no instruction, or none belongs to a prompt.
    """
    check_prompts(rows, source)
    asked, answered = ([row["instruction"] for row in found] for found in (prompts, rows))
    strange = len(answered) - sum(map(set(asked).__contains__, answered))
    if strange == len(answered):
        raise DataError(
            f"none of the {len(rows)} rows of {source} belongs to one of the {len(prompts)} prompts by its "
            "instruction. Look whether they answer these prompts (--reference-outputs)."
        )
    missing = len(asked) - sum(map(set(answered).__contains__, asked))
    return {"prompts": len(asked), "without_output": missing, "outputs": len(answered), "of_no_prompt": strange}


def say_left_out(found: Mapping[str, Any]) -> list[str]:
    """Args: `found` has, or has not, what `match_outputs` gives."""
    said = []
    if found.get("without_output"):
        said.append(f"{found['without_output']} of {found['prompts']} prompts have no output and are left out.")
    if found.get("of_no_prompt"):
        said.append(f"{found['of_no_prompt']} of {found['outputs']} outputs belong to no prompt and are left out.")
    return said


def baseline_file(given: Path | None) -> Path:
    """The outputs that the model is compared with, which also hold the prompts. Raises `DataError`."""
    if given is not None:
        return given
    try:
        return hub_file(BASELINE)
    except DataError as error:
        raise DataError(f"{error} Give the file with --reference-outputs.") from error


# --- with the package ---------------------------------------------------------------------------------------


def annotate(
    outputs: Path, reference: Path, judge: JudgeConfig, annotator: str, out_dir: Path, gamed: Path | None
) -> dict[str, Any]:
    """Annotates with the package `alpaca-eval` and computes all win rates; annotations stay in `out_dir`.

    The package keeps what was annotated in `out_dir/annotations_cache.HASH.json`, 128 rows at a time: a run that was
    stopped goes on from there. The package knows annotators by their name, so the hash is that of what they are.

    Args:
      annotator: the name of one of the package's annotators, or a directory with one.
      gamed: `df_gamed.csv`; None: the hub's, and without the hub there is no length-controlled win rate.

    Raises:
      StageError: the package is missing, or no annotation came of it.
    """
    with _environment(judge):
        package = _package()
        config, key = _annotator_config(package, annotator, judge, out_dir)
        try:
            _, annotations = package.evaluate(
                model_outputs=str(outputs),
                reference_outputs=str(reference),
                annotators_config=str(config),
                output_path=None,
                precomputed_leaderboard=None,
                is_return_instead_of_print=True,
                is_cache_leaderboard=False,
                fn_metric="get_winrate",
                sort_by="win_rate",
                caching_path=str(out_dir / f"annotations_cache.{key}.json"),
            )
        except Exception as error:  # of the judge, of its answers, of the package: it has no errors of its own
            raise StageError(
                f"alpaca-eval could not annotate with {judge.model} ({type(error).__name__}: {str(error)[:300]}). What "
                "was annotated is kept; mend the judge and run again."
            ) from error
        if not annotations:
            raise StageError(f"alpaca-eval made no annotations with {judge.model}: look at the judge and run again.")
        write_json(out_dir / "annotations.json", _plain(annotations))
        rates = win_rates(annotations)
        return rates | {"length_controlled_winrate": length_controlled(package, annotations, reference, gamed)}


def check_package() -> None:
    """Raises `StageError` where the package is missing; it is not imported for that."""
    if importlib.util.find_spec("alpaca_eval") is None:
        raise _no_package("it is not installed")


def _package() -> Any:
    try:
        import alpaca_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _no_package(str(error)) from None
    return alpaca_eval


def _no_package(why: str) -> StageError:
    return StageError(
        f"annotating needs the package alpaca-eval ({why}): pip install 'drift-jax[alpaca-eval]'. Without --annotate "
        "model_outputs.json is written, and --rows FILE computes win rates of annotations."
    )


@contextlib.contextmanager
def _environment(judge: JudgeConfig) -> Iterator[None]:
    """The variables that the package and its OpenAI client read; it reads most of them when it is imported."""
    values = {
        "OPENAI_API_KEY": read_api_key(judge.api_key_env) or "none",
        "OPENAI_BASE_URL": judge.base_url,
        "OPENAI_MAX_CONCURRENCY": str(judge.concurrency),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Annotator(TypedDict):
    """Of configs.yaml, as far as it is read here."""

    prompt_template: str
    completions_kwargs: dict[str, Any]


def read_annotator(folder: Path, name: str) -> dict[str, Any]:
    """configs.yaml of an annotator.

    Raises:
      DataError: it is not there, or none.
      ConfigError: it is not YAML.
    """
    path = folder / "configs.yaml"
    remedy = "An annotator of alpaca-eval is a name with prompt_template and completions_kwargs."
    if not path.exists():
        raise DataError(f"{name!r} is no annotator of alpaca-eval: {path} is not there. {remedy}")
    return check_form(Annotated[dict[str, _Annotator], Field(min_length=1)], read_yaml(path), str(path), remedy)


def _annotator_config(package: Any, annotator: str, judge: JudgeConfig, out_dir: Path) -> tuple[Path, str]:
    """The package's annotator with the judge's name for its model: (the directory `out_dir/annotator`, its hash)."""
    shipped = Path(package.constants.EVALUATORS_CONFIG_DIR)
    raw = read_annotator(Path(annotator) if Path(annotator).is_dir() else shipped / annotator, annotator)
    for config in raw.values():
        config["completions_kwargs"]["model_name"] = judge.model
        # OpenAI's names alone are known as chat models to the package.
        config["completions_kwargs"]["requires_chatml"] = True
        template = Path(config["prompt_template"])
        config["prompt_template"] = str(template if template.is_absolute() else shipped / template)
    key = _hash(raw)
    folder = out_dir / "annotator"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_writer(folder / "configs.yaml") as file:
        yaml.safe_dump(raw, file, sort_keys=False)
    return folder, key


def _hash(annotators: Mapping[str, Mapping[str, Any]]) -> str:
    """16 hex digits of all that an annotation depends on: model, parameters, and the words of the prompt."""

    def whole(annotator: Mapping[str, Any]) -> dict[str, Any]:
        template = Path(annotator["prompt_template"])  # where it lies says nothing
        return {**annotator, "prompt_template": read_text(template) if template.is_file() else str(template)}

    text = json.dumps({name: whole(one) for name, one in annotators.items()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(annotations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """JSON values: NaN, which other readers would refuse, is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    return [plain(row) for row in annotations]


def build_report(rates: Mapping[str, Any], model: str, judge: str, annotator: str) -> Report:
    """Of what `annotate` and `match_outputs` give. `model` is whose outputs these are, `judge` who compared them."""
    controlled = rates["length_controlled_winrate"]
    columns = ["model", "win rate, %", "length-controlled, %", "SE", "discrete, %", "rows", "length"]
    cells = [
        with_interval(rates["win_rate"], rates["win_rate_interval"]),
        controlled if isinstance(controlled, str) else number(controlled),
        number(rates["standard_error"]),
        number(rates["discrete_win_rate"]),
        str(rates["n_total"]),
        number(rates["avg_length"], "d"),
    ]
    notes = [f"Judge: {judge}, annotator {annotator} of alpaca-eval."]
    if rates["dropped"]:
        notes.append(f"{rates['dropped']} rows without a usable preference are left out.")
    notes += say_left_out(rates)
    data = {"model": model, **rates, "judge": judge, "annotator": annotator}
    return Report(f"AlpacaEval 2: {model}", [Section("AlpacaEval 2", columns, [[model, *cells]])], notes, data)
