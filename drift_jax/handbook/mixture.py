"""Which pairs a handbook file names: `dataset_mixer`, the newer `dataset_mixture`, or TRL's `dataset_name`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from drift_jax.handbook.values import HandbookFile, Outcome, Refused, Rule, check, shown

_Name = Annotated[str, Field(min_length=1)]
_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class DatasetPart:
    """One split of one dataset."""

    name: str  # a directory, or a hub id
    split: str
    config: str | None = None
    columns: tuple[str, ...] | None = None  # None: all
    share: float | None = None  # of its rows, 0 to 1, rounded down; None: all


@dataclass(frozen=True)
class DatasetMixture:
    """The pairs that a file names. Without parts it names none."""

    train: tuple[DatasetPart, ...] = ()
    test: tuple[DatasetPart, ...] = ()
    seed: int | None = 42  # of the shuffle after mixing; None: rows keep their order
    shuffle_parts: bool = False  # a part is shuffled before its share is taken
    test_size: int | float | None = None  # rows, or share of the rows, held out from the shuffled train parts


@with_config(ConfigDict(extra="forbid"))
class _Entry(TypedDict):
    id: _Name
    config: NotRequired[str | None]
    split: NotRequired[_Name]
    columns: NotRequired[list[str] | None]
    weight: NotRequired[_Share | None]


@with_config(ConfigDict(extra="forbid"))
class _Mixture(TypedDict):
    datasets: Annotated[list[_Entry], Field(min_length=1)]
    seed: NotRequired[int]
    test_split_size: NotRequired[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None]


def build_mixture(file: HandbookFile) -> DatasetMixture:
    """The pairs of a file whose data keys are all accepted by `DATA_RULES`."""
    for key, build in _SOURCES.items():
        if key in file.values:
            return build(file.values)
    return DatasetMixture()


def _from_mixer(values: Mapping[str, Any]) -> DatasetMixture:
    mixer = values["dataset_mixer"]
    configs = values.get("dataset_configs") or [None] * len(mixer)
    train, test = [], []
    for (name, share), config in zip(mixer.items(), configs, strict=True):
        for split in values.get("dataset_splits", _SPLITS):
            if "train" in split:
                train.append(DatasetPart(name, split, config, share=float(share)))
            else:
                test.append(DatasetPart(name, split, config))
    return DatasetMixture(tuple(train), tuple(test))


def _from_mixture(values: Mapping[str, Any]) -> DatasetMixture:
    mixture = values["dataset_mixture"]
    parts = []
    for entry in mixture["datasets"]:
        columns = entry.get("columns")
        part = DatasetPart(entry["id"], entry.get("split", "train"), entry.get("config"), share=entry.get("weight"))
        parts.append(part if columns is None else _with_columns(part, columns))
    return DatasetMixture(
        tuple(parts),
        seed=mixture.get("seed", 0),
        shuffle_parts=True,
        test_size=mixture.get("test_split_size"),
    )


def _with_columns(part: DatasetPart, columns: list[str]) -> DatasetPart:
    return DatasetPart(part.name, part.split, part.config, tuple(columns), part.share)


def _from_name(values: Mapping[str, Any]) -> DatasetMixture:
    name, config = values["dataset_name"], values.get("dataset_config")
    train = DatasetPart(name, values.get("dataset_train_split", "train"), config)
    test = DatasetPart(name, values.get("dataset_test_split", "test"), config)
    # Without evaluation TRL never asks for the test split, which need not exist then.
    held_out = () if values["eval_strategy"] in ("no", False) else (test,)
    return DatasetMixture((train,), held_out, seed=None)


_SPLITS = ("train", "test")
_SOURCES = {"dataset_mixture": _from_mixture, "dataset_mixer": _from_mixer, "dataset_name": _from_name}


# -------------------------------------------------------------------------------------- rules of the keys


def _dataset_mixer(value: Any, file: HandbookFile) -> Outcome:
    mixer = check(Annotated[dict[_Name, _Share], Field(min_length=1)], value)
    return Outcome({}, "pairs: " + ", ".join(f"{100 * share:g} % of {name}" for name, share in mixer.items()))


def _dataset_splits(value: Any, file: HandbookFile) -> Outcome:
    splits = check(list[_Name], value)
    if not all("train" in split or "test" in split for split in splits) or not any("train" in s for s in splits):
        raise Refused(f"must name splits with train or test in their names, one with train, found {shown(value)}.")
    return Outcome({}, _read_with("dataset_mixer", file))


def _dataset_configs(value: Any, file: HandbookFile) -> Outcome:
    configs, mixer = check(list[str | None], value), file.values.get("dataset_mixer")
    if configs and isinstance(mixer, dict) and len(configs) != len(mixer):
        raise Refused(
            f"must hold one config for each of the {len(mixer)} datasets of dataset_mixer, found {shown(value)}."
        )
    return Outcome({}, _read_with("dataset_mixer", file))


def _dataset_mixture(value: Any, file: HandbookFile) -> Outcome:
    mixture = check(_Mixture, value)
    for entry in mixture["datasets"]:
        columns = entry.get("columns")
        if columns is not None and not {"chosen", "rejected"} <= set(columns):
            raise Refused(f"columns of {entry['id']} must hold chosen and rejected, found {', '.join(columns)}.")
    size = value.get("test_split_size")
    if isinstance(size, float) and size >= 1:
        raise Refused(f"test_split_size must be a number of rows, or a share below 1, found {size}.")
    shares = [(entry["id"], entry.get("weight")) for entry in mixture["datasets"]]
    return Outcome({}, "pairs: " + ", ".join(f"{100 if w is None else 100 * w:g} % of {name}" for name, w in shares))


def _dataset_name(value: Any, file: HandbookFile) -> Outcome:
    return Outcome({}, f"pairs: {check(_Name, value)}")


def _read_by_name(value: Any, file: HandbookFile) -> Outcome:
    check(_Name, value)
    return Outcome({}, _read_with("dataset_name", file))


def _read_with(source: str, file: HandbookFile) -> str:
    return f"read with {source}" if source in file.values else f"does not apply: read only with {source}"


DATA_RULES: Mapping[str, Rule] = {
    "dataset_mixer": _dataset_mixer,
    "dataset_splits": _dataset_splits,
    "dataset_configs": _dataset_configs,
    "dataset_mixture": _dataset_mixture,
    "dataset_name": _dataset_name,
    "dataset_config": _read_by_name,
    "dataset_train_split": _read_by_name,
    "dataset_test_split": _read_by_name,
}
