"""Rows as a tensorflow-datasets directory of array_record files, read without TensorFlow.

Array records are read by index and in pieces, which suits rows kept in object storage and mounted
on every host of a pod. A row is stored as its JSON text, so no key of it is lost.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Example

FEATURE = "row"


def write_tfds(rows: Iterable[Example | dict[str, Any]], directory: str | Path) -> None:
    """Write rows (examples, or dicts in HealthBench's schema) in order as the split "train".

    `load_examples(directory)` reads them back. Raises InputError when the directory already holds
    something, or is not on a disk.
    """
    import tensorflow_datasets as tfds  # slow to import

    class RubricRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows of prompts and rubrics, each one JSON object."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksum files beside the code; finding it needs a package tfds lacks

        def _info(self):
            features = tfds.features.FeaturesDict({FEATURE: tfds.features.Text()})
            return tfds.core.DatasetInfo(
                builder=self, description=self.__doc__, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, row in enumerate(rows):
                row = row.to_dict() if isinstance(row, Example) else row
                yield index, {FEATURE: json.dumps(row, ensure_ascii=False)}

    if storage.is_remote(directory):
        raise InputError(f"{directory}: array_record files are written to a disk; copy them from there")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is in use: give a new directory to write the rows to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as root:
        builder = RubricRows(data_dir=root, file_format="array_record")
        builder.download_and_prepare()
        if directory.exists():
            directory.rmdir()
        shutil.move(builder.data_path, directory)


def read_tfds(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of the split "train" of a directory that `write_tfds` wrote. Raises InputError."""
    import tensorflow_datasets as tfds  # slow to import

    builder = tfds.builder_from_directory(directory)
    file_format = builder.info.file_format.value
    if "train" not in builder.info.splits or list(builder.info.features) != [FEATURE]:
        raise InputError(
            f"{directory} has the splits {sorted(builder.info.splits)} with the features "
            f"{sorted(builder.info.features)}: it needs a split 'train' with one text feature "
            f"{FEATURE!r} that holds a row's JSON, as srrl_jax.data.write_tfds makes it"
        )
    if file_format != "array_record":
        raise InputError(
            f"{directory} holds {file_format} files, which need TensorFlow: write it again with "
            "file_format='array_record'"
        )
    for record in builder.as_data_source(split="train"):
        yield json.loads(record[FEATURE])
