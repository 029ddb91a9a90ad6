"""The cases of the corpus, and a directory in which one of them is tried."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.bad_input import odd

FOLDER = Path(__file__).resolve().parent
AS_IT_IS = "as it is"  # of a valid twin: the file that lies there already


@dataclass(frozen=True)
class Case:
    """One file of a kind; `says` is None for the valid twin."""

    kind: str
    file: str
    says: str | None
    command: str
    lies: str | None
    beside: str | None

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.file}"

    def lay(self, work: Path, shared: Callable[[str], Path], judge: str = "") -> list[str]:
        """Fills `work` and returns the words of the command.

        Args:
          shared: the directory that a function of `beside` has filled, once for all cases.
          judge: the address of a server.
        """
        if self.beside is not None:
            shutil.copytree(shared(self.beside), work, dirs_exist_ok=True)
        path = work / (self.lies or self.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = odd.MAKERS.get(self.name)
        if made is not None:
            path.unlink(missing_ok=True)
            made(path)
        elif self.file != AS_IT_IS:
            shutil.copyfile(FOLDER / self.kind / self.file, path)
        return [word.format(input=path, work=work, judge=judge) for word in self.command.split()]

    def expects(self, work: Path) -> str:
        assert self.says is not None
        return self.says.replace("{input}", str(work / (self.lies or self.file))).replace("{work}", str(work))


def cases() -> Iterator[Case]:
    """All cases, the valid twin of a kind before its broken files."""
    for path in sorted(FOLDER.glob("*/cases.yaml")):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        for file, says in ((raw["good"], None), *raw["broken"].items()):
            yield Case(path.parent.name, file, says, raw["command"], raw.get("lies"), raw.get("beside"))


def picture(folder: Path) -> dict[str, str]:
    """Every path under a directory with what it is and holds; links and what has no end are not followed.

    The lock of a directory that is there already is no result: it says who was there last.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == ".lock":
            continue
        if path.is_symlink() or not path.is_file():
            found[str(path)] = f"{path.lstat().st_mode:o}"
        else:
            found[str(path)] = f"{path.stat().st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return found
