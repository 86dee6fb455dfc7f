"""What an export keeps of the folder that a model came from.

    config.json       as it was
    tensors.json      what stands before the tensors' names, and their dtypes
    tokenizer.json    and other files that go along untouched

A saved model may hold such a folder, without the weights: `lepton hub import` writes
it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lepton_jax.errors import CheckpointError, writing_remedy
from lepton_jax.hub.families import Family, family_of
from lepton_jax.models import DecoderShape

CONFIG = "config.json"
TENSORS = "tensors.json"
# Files that go along untouched: of tokenizers, chat templates and licences.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The part of a folder that an export keeps.

    Attributes:
      path: the folder.
      config: content of config.json.
      family: of the model.
      shape: of the model.
      base: what stands before the tensors' names.
      dtypes: "float32", "bfloat16" or "float16" by the tensors' names.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    shape: DecoderShape
    base: str
    dtypes: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Origin:
        """Read what `keep` wrote.

        Raises:
          CheckpointError: it can't be read.
        """
        config = read_json(path / CONFIG)
        content = read_json(path / TENSORS)
        family = family_of(config, path / CONFIG)
        try:
            shape = family.shape_of(config, path / CONFIG, tuple(content["ignore"]))
            shape = dataclasses.replace(shape, tied=content["tied"])
            return cls(path, config, family, shape, content["base"], content["dtypes"])
        except KeyError as error:
            raise CheckpointError(
                f"{TENSORS} has no {error}",
                where=path,
                remedy="name the folder that the model came from",
            ) from error

    def keep(
        self,
        place: Path,
        ignore: tuple[str, ...] = (),
    ) -> None:
        """Write all of it to a folder.

        Args:
          place: made if it is missing.
          ignore: keys of the configuration that are passed over.

        Raises:
          CheckpointError: it can't be written.
        """
        content = {
            "base": self.base,
            "tied": self.shape.tied,
            "ignore": list(ignore),
            "dtypes": dict(self.dtypes),
        }
        with writing(place):
            place.mkdir(exist_ok=True)
            shutil.copyfile(self.path / CONFIG, place / CONFIG)
            (place / TENSORS).write_text(json.dumps(content, indent=1))
            self.copy_companions(place)

    def copy_companions(self, place: Path) -> list[str]:
        """Copy tokenizer, chat template and licence to a folder, and return names."""
        files = {path for pattern in COMPANIONS for path in self.path.glob(pattern)}
        copied = []
        for path in sorted(files):
            if path.is_file():
                name = path.relative_to(self.path)
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place / name)
                copied.append(str(name))
        return copied


class writing:
    """Context that makes a CheckpointError of what the system says."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"the folder can't be written: {error}",
                where=self.folder,
                remedy=writing_remedy(error),
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the dict in a file.

    Raises:
      CheckpointError: there is none.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name}",
            where=path.parent,
            remedy="name the folder of a model as Hugging Face has it",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} can't be read: {error}",
            where=path,
            remedy="download it again",
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} is no dict", where=path, remedy="download it again"
        )
    return content
