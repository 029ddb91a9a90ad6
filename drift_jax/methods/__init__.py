"""The methods of `recipe.method`: a file each, whose function `sides` says where both replies of a pair come from.

The file's name is the method's, with `-` for `_`. All else is shared: prompts, sampler, rules on replies, chooser,
ranker, pairs, DPO. So a new method is a file here:

    def sides(style: str) -> Method:
        return Method(records="dsat", draws=(style,), chosen="drawn", rejected="logged")
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Literal

from drift_jax.records import DsatRecord, SatRecord

Record = DsatRecord | SatRecord
# logged: the reply in the log. drawn: the policy's. best, worst: of one of its replies to each of several prompts.
Side = Literal["logged", "drawn", "best", "worst"]

DEFAULT = "drift"
UNGUIDED = "unguided"  # the style of the prompt that knows no reply and no complaint (`data/prompts.py`)
_SIDES = (("drawn", "logged"), ("logged", "drawn"), ("best", "worst"))


@dataclass(frozen=True)
class Method:
    """Where the two replies of a pair come from.

    Of each prompt `sampling.n` replies are drawn, of which `sampling.chooser` picks one; `best` and `worst` are then
    what `recipe.ranker` makes of the two picks.

    Raises:
      ValueError: no pair can be made so.
    """

    records: Literal["dsat", "sat"]  # which logged replies: those that users were unhappy with, or happy with
    draws: tuple[str, ...]  # styles of the prompts, keys of `data/prompts.PROMPT_STYLES`
    chosen: Side
    rejected: Side

    def __post_init__(self) -> None:
        if (self.chosen, self.rejected) not in _SIDES:
            raise ValueError(f"chosen and rejected must be one of {_SIDES}, found {(self.chosen, self.rejected)}")
        if len(self.draws) != 1 + self.ranks:
            raise ValueError(f"these sides take {1 + self.ranks} draws, found {self.draws}")
        if self.records == "sat" and set(self.draws) != {UNGUIDED}:
            raise ValueError(f"a SAT record has no complaint to guide a draw by, found {self.draws}")

    @property
    def ranks(self) -> bool:
        """Whether both replies are drawn, and a ranker says which is which."""
        return self.chosen == "best"

    @property
    def logged(self) -> Literal["chosen", "rejected"] | None:
        """The side of the logged reply, if it is in the pair at all."""
        return next((side for side in ("chosen", "rejected") if getattr(self, side) == "logged"), None)


@cache
def method_names() -> tuple[str, ...]:
    """Every method, in alphabetical order."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def load_method(name: str, style: str) -> Method:
    """The method of that name, a member of `method_names()`; `style` is that of guided prompts, `sampling.style`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").sides(style)


def logged_reply(record: Record) -> str:
    """What stands in the log, whether the user liked it or not."""
    return record.rejected if isinstance(record, DsatRecord) else record.chosen
