"""The ``data`` section of a run's configuration, and what of it no run can have."""

import math
from dataclasses import dataclass
from typing import Literal

from olmo_core.config import Config

from ultramem.data.sources import RawSettings, SourceSpec
from ultramem.errors import ConfigError
from ultramem.model.configuration import make_memory_config

TokenType = Literal["uint16", "uint32"]


@dataclass
class SourceSection(Config):
    """One source of a mixture: a data folder, or patterns of raw token files."""

    folder: str | None = None
    files: list[str] | None = None
    weight: float = 1.0  # its share of the training tokens; the weights are divided by their sum


@dataclass
class DataSection(Config):
    """What the run reads, by exactly one of ``folder``, ``files`` and ``sources``, and how it is cut into sequences."""

    folder: str | None = None  # from `ultramem data prepare`
    files: list[str] | None = None  # raw token files, as `dolma tokens` writes them; patterns with * are expanded
    sources: list[SourceSection] | None = None
    mixture_tokens: int | None = None  # of one pass over a mixture; None: the length of the run
    # Of raw token files, which do not say it.
    tokenizer: str | None = None
    dtype: TokenType | None = None  # None: what the tokenizer's ids fit
    eos_token_id: int | None = None  # None: the tokenizer's
    pad_token_id: int | None = None
    validation_files: list[str] | None = None
    sequence_length_tokens: int = 1024
    mask_documents: bool = False  # a token attends to its own document only
    fingerprint: str | None = None  # None: taken from the data; otherwise it must match

    def specs(self) -> tuple[SourceSpec, ...]:
        """The sources, one or several, without looking at the disk."""
        if self.sources is None:
            return (SourceSpec(self.folder, tuple(self.files or ())),)
        return tuple(SourceSpec(item.folder, tuple(item.files or ()), item.weight) for item in self.sources)

    def raw_settings(self) -> RawSettings:
        """What is said about raw token files."""
        return RawSettings(
            self.tokenizer, self.dtype, self.eos_token_id, self.pad_token_id, tuple(self.validation_files or ())
        )

    def validate(self) -> None:
        """Raises ConfigError for settings that do not name one set of data."""
        given = [key for key in ("folder", "files", "sources") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ConfigError(
                "'data.folder' is missing: give the folder that `ultramem data prepare` wrote, or raw token files by "
                "'data.files', or several sources with weights by 'data.sources'"
                if not given
                else f"give only one of 'data.folder', 'data.files' and 'data.sources'; given: {', '.join(given)}"
            )
        if self.sources is None and self.mixture_tokens is not None:
            raise ConfigError("'data.mixture_tokens' is the length of a mixture: it needs 'data.sources'")
        for key, items in (("data.files", self.files), ("data.sources", self.sources)):
            if items is not None and not items:
                raise ConfigError(f"'{key}' is an empty list: name at least one")
        for i, source in enumerate(self.sources or ()):
            if (source.folder is None) == (not source.files):
                raise ConfigError(f"'data.sources[{i}]' needs exactly one of 'folder' and 'files' (a list of patterns)")
            if not (source.weight > 0 and math.isfinite(source.weight)):
                raise ConfigError(f"'data.sources[{i}].weight' must be greater than 0, but {source.weight} was given")
        if self.folder is not None:
            self._refuse_raw_settings("with 'data.folder' the folder says this itself")
        elif all(spec.folder is None for spec in self.specs()) and self.tokenizer is None:
            raise ConfigError(
                "raw token files ('files') do not say how they were made: give 'data.tokenizer', a tokenizer folder or "
                "a tokenizer.json file, and where it does not name them 'data.eos_token_id' and 'data.pad_token_id'"
            )

    def _refuse_raw_settings(self, reason: str) -> None:
        for key in ("tokenizer", "dtype", "eos_token_id", "pad_token_id", "validation_files"):
            if getattr(self, key) is not None:
                raise ConfigError(f"'data.{key}' is about raw token files ('data.files'): {reason}; leave it out")


def check_maskable(mask_documents: bool, model: dict) -> None:
    """Raises ConfigError where documents are masked but a memory would still look across them."""
    if not mask_documents or not model.get("memory"):
        return
    memory = make_memory_config(model["memory"])
    if memory.num_past_tokens:
        raise ConfigError(
            f"'data.mask_documents: true' does not go with this memory ('model.memory.type: {memory.type}'): its "
            f"queries read {memory.num_past_tokens} tokens before their own, of the document before too. Set "
            "mask_documents to false, or have the memory look at one token only (query_conv 0)"
        )
