"""A run's configuration: YAML plus ``--key.sub value`` overrides, validated once, then passed as values."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field

from trinityx_jax.data.formats import FORMATS, FieldMap, get_format
from trinityx_jax.data.paper import paper_split
from trinityx_jax.data.templates import TEMPLATES
from trinityx_jax.errors import UserError
from trinityx_jax.files import write_text
from trinityx_jax.mocae.router import MoCaEConfig, preset

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a folder's name on every system
RESERVED = {"base", "MoCaE", "naive-merge", "uncalibrated"}  # systems that experts are compared with
MOST = 2**31 - 16  # of counters and seeds, which JAX keeps in 32 bits


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _numbers_are_not_flags(cls, values: Any) -> Any:
        """YAML's true and false stand for themselves, not for 1 and 0."""
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            key = field.alias or name
            if isinstance(values.get(key), bool) and field.annotation is not bool:
                raise ValueError(f"{key}: true and false are no value of this key")
        return values


class ExpertsConfig(_Section):
    """``from``: where stage 2 takes its experts from: a run, a folder of experts or of PEFT adapters, or such
    a folder for each name; None is the run itself."""

    source: str | dict[str, str] | None = Field(default=None, alias="from")
    names: list[str] = ["helpful", "harmless", "honest"]
    rank: int = Field(default=64, ge=1, le=2**16)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    sites: list[Literal["gate", "up", "down", "q", "k", "v", "o"]] = Field(default=["gate", "up", "down"], min_length=1)

    @pydantic.field_validator("sites")
    @classmethod
    def _once(cls, sites: list[str]) -> list[str]:
        if len(set(sites)) < len(sites):
            raise ValueError(f"{sites} holds a site twice")
        return sites


class DataConfig(_Section):
    """One objective's rows: of a source, or the union of other objectives' (``mix``).

    ``split``: of a hub or TFDS data set, by position (``train[:408]``), or the paper's by name (``paper-train``).
    ``test_format``, ``test_fields``: where the test rows are of another schema.
    ``calibration``, ``validation``: shares of the training questions held out, for the router and for early stopping.
    ``resample``: training rows drawn with replacement to this many; the paper's 5,678 TruthfulQA rows follow from no
    public code, this is the nearest to them.
    """

    source: str | None = None
    format: Literal[FORMATS] | None = None  # type: ignore[valid-type]
    fields: FieldMap | None = None
    split: str = "train"
    limit: int | None = Field(default=None, ge=1)
    test: str | None = None
    test_format: Literal[FORMATS] | None = None  # type: ignore[valid-type]
    test_fields: FieldMap | None = None
    test_split: str = "test"
    test_limit: int | None = Field(default=None, ge=1)
    template: Literal[TEMPLATES] = "auto"  # type: ignore[valid-type]
    calibration: float = Field(default=0.15, gt=0, lt=1)
    validation: float = Field(default=0.0, ge=0, lt=1)
    resample: int | None = Field(default=None, ge=1, le=10**8)
    on_bad_row: Literal["error", "skip"] = "error"
    on_overlap: Literal["drop", "keep", "error"] = "drop"
    mix: list[str] | None = None

    @property
    def skip_bad(self) -> bool:
        return self.on_bad_row == "skip"

    @property
    def test_kind(self) -> str:
        """The schema of the test rows."""
        return self.test_format or self.format or ""

    @property
    def test_map(self) -> FieldMap | None:
        """The field map of the test rows."""
        return self.test_fields or (self.fields if self.test_kind == self.format else None)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.mix is not None:
            return self._check_mix()
        for key in ("source", "format"):
            if not getattr(self, key):
                raise ValueError(f"{key}: this key is needed (or mix)")
        try:
            get_format(self.format or "", self.fields)
            paper_split(self.format or "", self.split)
            if self.test is not None:
                get_format(self.test_kind, self.test_map)
                paper_split(self.test_kind, self.test_split)
        except UserError as error:
            raise ValueError(str(error)) from error
        if self.test is None:
            without = ("test_format", "test_fields", "test_split", "test_limit", "on_overlap")
            self._only_defaults(without, "without test")
        if self.calibration + self.validation >= 1:
            raise ValueError("calibration and validation together leave no question to train on")
        return self

    def _check_mix(self) -> DataConfig:
        assert self.mix is not None
        self._only_defaults([key for key in type(self).model_fields if key != "mix"], "beside mix")
        if not self.mix or len(set(self.mix)) < len(self.mix):
            raise ValueError(f"mix: {self.mix} must name objectives, each once")
        return self

    def _only_defaults(self, keys: Sequence[str], when: str) -> None:
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: this key has no effect {when}; remove it")


class TrainConfig(_Section):
    """``steps`` wins over ``epochs``; ``batch_size`` is rows per expert and step, over all hosts.

    ``accumulate`` serves a step's rows in so many parts, with the same result and less memory. ``packing`` puts
    several rows into one of ``seq_len`` tokens. ``evaluate_every`` measures the loss on ``data.NAME.validation``;
    with ``patience``, an expert stops after so many measurements without a new lowest, and keeps its best.
    ``experts`` names those to train anew. ``max_skipped``: steps in a row with a loss or gradient that is not
    finite, each of which changes nothing, until the run stops.
    """

    steps: int | None = Field(default=None, ge=1, le=MOST)
    epochs: float = Field(default=3.0, gt=0, le=1e6)
    batch_size: int = Field(default=8, ge=1, le=2**20)
    seq_len: int = Field(default=512, ge=2, le=2**24)
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    accumulate: int = Field(default=1, ge=1)
    packing: bool = False
    evaluate_every: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    max_skipped: int = Field(default=10, ge=1)
    mode: Literal["joint", "single"] = "joint"
    experts: list[str] | None = None
    remat: Literal["none", "kept", "all"] = "kept"

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} parts do not divide batch_size {self.batch_size}")
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience: evaluate_every is needed, nothing is measured without it")
        if self.experts is not None and (not self.experts or len(set(self.experts)) < len(self.experts)):
            raise ValueError(f"experts: {self.experts} names no expert, or one twice")
        return self


class CheckpointConfig(_Section):
    """A checkpoint every so many steps; the newest ``keep`` stay."""

    every: int = Field(default=50, ge=1)
    keep: int = Field(default=2, ge=1)


class EvaluateConfig(_Section):
    """Rows per batch, prompts answered side by side (per objective), answer length, bootstrap resamples."""

    batch_size: int = Field(default=16, ge=1, le=2**20)
    prompts: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=48, ge=1)
    bootstrap: int = Field(default=1000, ge=100)


class RunConfig(_Section):
    """Everything a stage needs, read in one place."""

    model: str = Field(min_length=1)
    out: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, le=MOST)
    dtype: Literal["float32", "bfloat16"] = "float32"
    experts: ExpertsConfig = ExpertsConfig()
    data: dict[str, DataConfig]
    train: TrainConfig = TrainConfig()
    mocae: dict[str, Any] = {}
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self.mocae_config()
        names = self.experts.names
        if not names:
            raise ValueError("experts.names: at least one expert is needed")
        for name in names:
            if not NAME.fullmatch(name) or name in RESERVED or len(name) > 100:
                raise ValueError(
                    f"experts.names: {name!r} cannot be an expert's name (letters, digits, '.', '_', '-'; at most 100)"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"experts.names: {names} holds a name twice")
        missing = [n for n in names if n not in self.data]
        if missing:
            raise ValueError(f"data: expert {missing[0]!r} has no rows (data.{missing[0]} is not set)")
        mixed = {part for data in self.data.values() for part in data.mix or ()}
        unused = [n for n in self.data if n not in names and n not in mixed]
        if unused:
            raise ValueError(f"data.{unused[0]}: there is no expert of that name in experts.names, and no mix of it")
        for name, data in self.data.items():
            for part in data.mix or ():
                if part not in self.data or self.data[part].mix is not None:
                    raise ValueError(f"data.{name}.mix: {part!r} is not an entry of data with rows of its own")
        for name in self.train.experts or ():
            if name not in names:
                raise ValueError(f"train.experts: {name!r} is not in experts.names")
        without = [part for name in names for part in self.parts(name) if not self.data[part].validation]
        if self.train.evaluate_every is not None and without:
            raise ValueError(f"train.evaluate_every: data.{without[0]}.validation is needed, a share to measure on")
        return self

    def parts(self, name: str) -> dict[str, DataConfig]:
        """The entries of ``data`` that an objective's rows come from: its own, or those that it mixes."""
        return {part: self.data[part] for part in self.data[name].mix or (name,)}

    def mocae_config(self) -> MoCaEConfig:
        """The router's typed switches: a preset with this file's changes."""
        changes = dict(self.mocae)
        if not isinstance(changes.get("preset", ""), str):
            raise UserError(f"mocae.preset: {changes['preset']!r} is not a preset's name")
        return preset(changes.pop("preset", "recommended"), **changes)


SECTIONS: dict[str, type[_Section]] = {
    "experts": ExpertsConfig,
    "data": DataConfig,  # one for each name
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "evaluate": EvaluateConfig,
}

# Keys that a stage does not use: setting one there is an error, and they are not saved with it.
UNUSED: dict[str, dict[str, Any]] = {
    "experts": {"experts": {"source"}, "mocae": True},
    "router": {
        "experts": {"rank", "alpha", "dropout", "sites"},
        "train": {"mode", "experts", "accumulate", "packing", "patience"},
    },
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats as well (PyYAML alone reads 1e-3 as text); a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> RunConfig:
    """Read a YAML file and apply ``--key.sub value`` pairs.

    Args:
        stage: ``experts`` or ``router``; a key that the stage does not use raises.

    Raises:
        UserError: the file is missing or not YAML; a key is unknown, or a value out of range.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path}: not YAML ({reason})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    config = parse_config(_override(values, overrides), str(path))
    for section, keys in UNUSED.get(stage or "", {}).items():
        part = getattr(config, section)
        used = {section} & config.model_fields_set if keys is True else keys & part.model_fields_set
        for key in sorted(used):
            name = section if keys is True else f"{section}.{type(part).model_fields[key].alias or key}"
            raise UserError(f"{path}: {name}: this key has no effect on stage {stage!r}; remove it")
    return config


def parse_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate a mapping; the first thing wrong is raised as one sentence."""
    try:
        return RunConfig.model_validate(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] not in UNKNOWN)  # a misspelt key leaves another missing
        raise UserError(f"{where}: {_sentence(first, values)}") from error


def save_config(config: RunConfig, path: Path, stage: str) -> None:
    """Write what a stage uses of the configuration, defaults included, as YAML."""
    values = config.model_dump(mode="json", by_alias=True, exclude=UNUSED[stage])
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _override(values: dict[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    if len(pairs) % 2:
        raise UserError(f"{pairs[-1]}: an override needs a value (--key.sub VALUE)")
    seen: set[str] = set()
    for flag, raw in zip(pairs[::2], pairs[1::2], strict=True):
        if not flag.startswith("--"):
            raise UserError(f"{flag}: expected --key.sub VALUE")
        if flag in seen:
            raise UserError(f"{flag}: this override stands twice")
        seen.add(flag)
        node: Any = values
        *parents, last = flag[2:].split(".")
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise UserError(f"{flag}: {key!r} is a value, not a section")
        try:
            node[last] = yaml.load(raw, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):  # such as a path that begins like a date
            node[last] = raw
    return values


SAID = {  # pydantic's words, where they are not a user's
    "list_type": "expected a list, such as [a, b]",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
    "dataclass_type": "expected keys and values",
}
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's names for a key that there is not


def _sentence(error: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] in UNKNOWN:
        return f"{place}: unknown key{_nearest(str(error['loc'][-1]), _known(error['loc']))}"
    if error["type"] == "missing":
        return f"{place}: this key is needed"
    message = SAID.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    shown = f" (it is {error['input']!r})" if place and not isinstance(error["input"], dict) else ""
    return f"{place}: {message}{shown}" if place else message


def _known(loc: Sequence[Any]) -> list[str]:
    """The keys of the section in which an unknown key stood."""
    if "fields" in str(loc[-2:-1]):  # data.NAME.fields and test_fields
        return [field.name for field in dataclasses.fields(FieldMap)]
    model: type[_Section] = RunConfig if len(loc) == 1 else SECTIONS[str(loc[0])]
    return [field.alias or name for name, field in model.model_fields.items()]


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f" (nearest: {close[0]})" if close else ""
