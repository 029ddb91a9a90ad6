"""`drift card`: README.md of an exported policy, with data, recipe, figures, limits, and the licence of the base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from drift_jax.errors import DataError, DriftError
from drift_jax.evaluation.report import Report, to_markdown
from drift_jax.files import atomic_writer, refuse_file_in_path
from drift_jax.models.hf import LICENCE_FILES, resolve_model
from drift_jax.records import read_dsat, read_pairs
from drift_jax.report.numbers import drops_section, measures_of, stages_section, versions_section
from drift_jax.report.runs import Run, Stage
from drift_jax.yaml_files import parse_yaml

CARD_FILE = "README.md"
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
# As a hub writes them: what the first lines of a licence file say.
_KNOWN_TEXTS = (
    ("Apache License", "apache-2.0"),
    ("MIT License", "mit"),
    ("Qwen RESEARCH LICENSE", "other"),
    ("Qwen LICENSE AGREEMENT", "other"),
)


def write_card(run: Run, out: Path | None = None, licence: str | None = None) -> Path:
    """Writes the card of the last exported policy, beside its weights unless `out` names a file. Returns where.

    Args:
      licence: of the base model, as a hub writes it; None: what the base's own files say.

    Raises:
      DataError: no stage has an exported policy, or a file of the run cannot be read.
      StageError: the card cannot be written.
    """
    exported = [stage for stage in run.stages if (stage.folder / "hf" / "config.json").is_file()]
    if not exported:
        raise DataError(f"{run.folder} has no exported policy (hf/) yet: finish the run with drift run.")
    path = out or exported[-1].folder / "hf" / CARD_FILE
    try:
        text = render_card(run, exported[-1], licence)
    except UndefinedError as error:
        raise DataError(
            f"{run.folder / 'config.yaml'} lacks what the card says: {error}. Restore the config that the run was made "
            "with."
        ) from None
    refuse_file_in_path(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(text)
    return path


def render_card(run: Run, stage: Stage, licence: str | None = None) -> str:
    """Markdown with the front matter that model hubs read. Raises as `write_card`."""
    model, data = run.config.get("model", {}), run.config.get("data", {})
    base = str(model.get("path", ""))
    found = licence or _licence_of(base, model.get("revision"))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    head = ModelCardData(
        license=found,
        base_model=base if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["drift", "dpo", "drift_jax"],
    )
    sections = [s for s in (stages_section([run]), drops_section([run])) if s.rows]
    versions = versions_section([run]).rows
    return (
        _environment()
        .get_template("card.md")
        .render(
            front_matter=head.to_yaml(),
            name=f"{run.name} {stage.name}",
            base=base if is_hub_id else Path(base).name,  # a path of this machine is nobody else's business
            licence=found,
            method=run.config.get("recipe", {}).get("method", "drift"),
            config=run.config,
            stage=stage,
            stages=run.stages,
            sources=[line for key in ("dsat", "sat", "seed_train") for line in _describe(key, data.get(key))],
            tables=to_markdown(Report("Figures", sections)).partition("\n")[2].strip().replace("## ", "### "),
            results=_results(run, stage),
            intervals=stage.evaluation.get("preference", {}).get("pairs"),
            versions=", ".join(f"{package} {version}" for package, version in versions),
            policy_hash=_policy_hash(run, stage),
            warnings=stage.summary.get("warnings", []),
        )
    )


def _environment() -> Environment:
    """Markdown: `code` and `fence` are what keeps text from being read as markup."""
    environment = Environment(
        loader=PackageLoader("drift_jax.report", "templates"),
        autoescape=False,  # noqa: S701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code_span
    return environment


def code_span(value: object) -> str:
    """A value on one line as Markdown code: nothing in it is read as markup."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _licence_of(base: str, revision: str | None) -> str | None:
    """What the base's README.md or licence file says; None where neither does, or the base is not on this machine."""
    try:
        folder = Path(base) if Path(base).is_dir() else resolve_model(base, revision)
    except DriftError:
        return None
    readme = folder / CARD_FILE
    if readme.is_file():
        match = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
        try:
            said = parse_yaml(match[1]) if match else None
        except yaml.YAMLError:
            said = None
        if isinstance(said, Mapping) and isinstance(said.get("license"), str):
            return said["license"]
    for name in LICENCE_FILES:
        if (folder / name).is_file():
            first = (folder / name).read_text(encoding="utf-8", errors="replace")[:500]
            return next((known for words, known in _KNOWN_TEXTS if words.lower() in first.lower()), "other")
    return None


def _describe(key: str, named: Any) -> list[str]:
    """What a file of the run holds: rows, and from which sources under which licences, as the rows say."""
    if not named:
        return []
    path = Path(str(named))
    try:
        if key == "dsat":
            extras: Sequence[Mapping[str, Any]] = [record.extra for record in read_dsat(path, "skip").records]
        elif key == "seed_train":
            extras = [{**pair.meta, **pair.extra} for pair in read_pairs(path, "skip").records]
        else:
            return [f"{code_span(path.name)} (data.{key})"]
    except DriftError:
        return [f"{code_span(path.name)} (data.{key}); the file is no longer there"]
    kinds = Counter(
        (str(row.get("source", "no source named")), str(row.get("license", "no licence"))) for row in extras
    )
    most = kinds.most_common(10)
    lines = [f"{code_span(path.name)} (data.{key}): {len(extras)} rows"]
    lines += [f"  {count} from {code_span(source)}, {code_span(licence)}" for (source, licence), count in most]
    return lines


def _results(run: Run, stage: Stage) -> list[str]:
    """A line for each evaluation of this stage, those of its training apart."""
    found = []
    for m in measures_of(run):
        if m.stage == stage.name and not m.source.endswith(("eval.json", "metrics.jsonl")):
            interval = "" if m.interval is None else f" (95 %: {m.interval[0]:.3g} to {m.interval[1]:.3g})"
            found.append(f"{code_span(m.metric)}: {m.value:.3g}{interval}")
    return found


def _policy_hash(run: Run, stage: Stage) -> str:
    """sha256 over weights, config, tokenizer and template, as pairs name their sampler's policy."""
    return run.manifest.model_hash(stage.folder / "hf")
