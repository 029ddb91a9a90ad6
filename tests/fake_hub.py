"""A hub without a network: one model, of which a download gets the files that its patterns ask for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects


@dataclass(frozen=True)
class FakeHub:
    """`download` stands for `huggingface_hub.snapshot_download`."""

    model: Path  # the files that the hub has
    cache: Path  # where they are downloaded to

    def download(self, repo: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        self.cache.mkdir(exist_ok=True)
        names = [path.name for path in self.model.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=list(allow_patterns)):
            shutil.copyfile(self.model / name, self.cache / name)
        return str(self.cache)
