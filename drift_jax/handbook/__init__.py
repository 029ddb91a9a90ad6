"""alignment-handbook DPO files as they are: flat YAML keys -> this package's config.

`keys.py` knows every key as data, `rules.py` and `mixture.py` those whose meaning depends on another one,
`translation.py` reads a file. `data/mixer.py` loads the pairs that a file names.
"""

from drift_jax.handbook.mixture import DatasetMixture, DatasetPart
from drift_jax.handbook.translation import (
    TranslatedKey,
    Translation,
    is_handbook_file,
    translate_handbook,
    translation_table,
    with_overrides,
)

__all__ = [
    "DatasetMixture",
    "DatasetPart",
    "TranslatedKey",
    "Translation",
    "is_handbook_file",
    "translate_handbook",
    "translation_table",
    "with_overrides",
]
