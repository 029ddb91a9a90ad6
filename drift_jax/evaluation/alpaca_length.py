"""The length-controlled win rate of AlpacaEval 2, by the package `alpaca-eval` and the hub's `df_gamed.csv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_jax.errors import DataError
from drift_jax.evaluation.json_rows import read_json

LC_MISSING = "not computed: needs df_gamed.csv"
BASELINE = "alpaca_eval_gpt4_baseline.json"
GAMED = "df_gamed.csv"
_DATASET = "tatsu-lab/alpaca_eval"


def hub_file(name: str) -> Path:
    """A file of the benchmark's dataset on the hub (its prompts are CC-BY-NC). Raises `DataError` without the hub."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_DATASET, name, repo_type="dataset"))
    except Exception as error:  # no network, no such file: the library has many
        raise DataError(
            f"the hub did not give {name} of {_DATASET} ({type(error).__name__}: {str(error).splitlines()[0][:200]})."
        ) from error


def length_controlled(
    package: Any, annotations: Sequence[Mapping[str, Any]], reference: Path, gamed: Path | None
) -> float | str:
    """In per cent, or why there is none.

    The package finds a prompt's difficulty by its place among the rows, whatever the prompt. Of other rows than the
    benchmark's it would take those of other prompts.
    """
    import pandas as pd  # pyright: ignore[reportMissingImports]

    try:
        path = gamed or hub_file(GAMED)
    except DataError:
        return LC_MISSING
    try:
        # A file of difficulties that is given is of the prompts that are given with it.
        prompts = read_json(reference if gamed else hub_file(BASELINE), "outputs")
    except DataError:
        return f"not computed: needs {BASELINE} of the hub, which has the benchmark's prompts"
    module = package.metrics.glm_winrate
    # The package knows the hub only; the file that is given stands for its download.
    download, module.hf_hub_download = module.hf_hub_download, lambda **_: str(path)
    try:
        if other := _other_rows(annotations, prompts, len(set(pd.read_csv(path)["index"]))):
            return f"not computed: {other}"
        # A column `index` of the outputs' own would be taken for the rows' places.
        rows = pd.DataFrame(list(annotations)).drop(columns="index", errors="ignore")
        found = module.get_length_controlled_winrate(rows, save_weights_dir=None)
    except Exception as error:  # a file of another form, and the like
        return f"not computed: {type(error).__name__}: {str(error)[:200]}"
    finally:
        module.hf_hub_download = download
    return float(found["length_controlled_winrate"])


def _other_rows(
    annotations: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]], difficulties: int
) -> str | None:
    """Why the rows are not those of the benchmark's prompts, all of them and in their order."""
    if len(prompts) != difficulties:
        return f"df_gamed.csv is of {difficulties} prompts, the reference outputs are of {len(prompts)}"
    if len(annotations) != len(prompts):
        return f"it is of all {len(prompts)} prompts of the benchmark, and {len(annotations)} rows are annotated"
    asked = zip(
        (row.get("instruction") for row in annotations), (row.get("instruction") for row in prompts), strict=True
    )
    place = next((place for place, (one, other) in enumerate(asked, 1) if one != other), None)
    return None if place is None else f"row {place} is of another prompt than the benchmark's"
