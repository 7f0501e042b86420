"""What the members of an ensemble are: one base per family and members that vary one thing, or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from galray.ensemble.settings import FACTORS, HEADS, EnsembleSettings, FamilyDesign
from galray.errors import GalrayError
from galray.seeds import seed_for

__all__ = ["MemberSpec", "design"]


@dataclass(frozen=True)
class MemberSpec:
    """One member: what it varies, and the address of its contents.

    The labels count from the base (seed 0; bootstrap 0 is the full sample; draw 0 the observed values;
    systematic, hyperparameter and selection 0 are the configuration's own); `streams` turns them into numbers
    for random generators, `variation` says what the last three mean.

    Arguments:
        index: Place in the ensemble and number of the member's folder; no part of its identity.
        family: "flow", "score" or "moments".
        seed: Label of the training seed.
        bootstrap: Label of the bootstrap, 0 for none.
        draw: Label of the redraw of measurement errors, 0 for none.
        root_seed: Root seed of the run.
        context_hash: Hash of all else that the result depends on: data manifest, model configuration.
        systematic: Label of the draw of common errors, 0 for none.
        hyperparameter: Label of the draw of hyperparameters, 0 for the configuration's own.
        selection: Number of the selection, 0 for the configuration's own.
        variation: See `EnsembleSettings.variation`.
    """

    index: int
    family: str
    seed: int = 0
    bootstrap: int = 0
    draw: int = 0
    root_seed: int = 0
    context_hash: str = ""
    systematic: int = 0
    hyperparameter: int = 0
    selection: int = 0
    variation: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """Content hash: equal for members that would give the same result, whatever their index."""
        content: list[Any] = [self.family, self.seed, self.bootstrap, self.draw]
        content += [self.root_seed, self.context_hash]
        if any(more := [self.systematic, self.hyperparameter, self.selection, dict(self.variation)]):
            content += more
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def labels(self) -> dict[str, int]:
        """The labels by factor."""
        return {name: getattr(self, name) for name in FACTORS}

    @property
    def varied(self) -> str:
        """What sets the member apart from the base: "base", a factor, or a sum of them."""
        return "+".join(name for name, label in self.labels.items() if label) or "base"

    @property
    def whole(self) -> bool:
        """Whether it differs from the base by its seed alone: such members give the value."""
        return self.varied in ("base", "seed")

    @property
    def slug(self) -> str:
        """Short name for files: "base-0", "draw-2", "seed-1+draw-2"."""
        return "+".join(f"{name}-{label}" for name, label in self.labels.items() if label) or "base-0"

    @property
    def name(self) -> str:
        """Short name for people, such as "score-007 bootstrap 1"."""
        parts = [f"{name} {label}" for name, label in self.labels.items() if label]
        return f"{self.family}-{self.index:03d} {' '.join(parts) or 'base'}"

    @property
    def tags(self) -> dict[str, str]:
        """Tags for the tracker: identity and what was varied."""
        return {
            "galray.member": self.id,
            "galray.index": str(self.index),
            "galray.family": self.family,
            "galray.varied": self.varied,
            "galray.context_hash": self.context_hash,
        } | {f"galray.{name}": str(label) for name, label in self.labels.items()}

    @property
    def streams(self) -> dict[str, int | None]:
        """Seeds of the member's random streams.

        `split` (training or validation) is one for the whole run, so that a bootstrap never mixes the
        two; `training` depends on family and seed; `bootstrap`, `draw` and `systematic` are shared between
        families, so that methods see the same resampled stars and one redrawn catalogue serves all of them;
        they are None where nothing is resampled or redrawn.
        """
        return {
            "split": seed_for(self.root_seed, "split"),
            "training": seed_for(self.root_seed, "training", self.family, self.seed),
        } | {
            name: seed_for(self.root_seed, name, label) if (label := getattr(self, name)) else None
            for name in ("bootstrap", "draw", "systematic")
        }

    def to_dict(self) -> dict[str, Any]:
        """Give the spec as JSON-ready values, with its id, name and streams."""
        return {
            "index": self.index,
            "family": self.family,
            **self.labels,
            "variation": dict(self.variation),
            "root_seed": self.root_seed,
            "context_hash": self.context_hash,
            "id": self.id,
            "name": self.name,
            "varied": self.varied,
            "streams": self.streams,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemberSpec:
        """Read back what `to_dict` wrote."""
        names = ("index", "family", *FACTORS, "variation", "root_seed", "context_hash")
        return cls(**{name: values[name] for name in names if name in values})


def design(
    settings: EnsembleSettings, root_seed: int, context_hash: str | Mapping[str, str] = ""
) -> list[MemberSpec]:
    """Lay out the ensemble.

    Each family has a base (seed 0, all stars, observed values, the configuration's own choices), further
    seeds on the same data, and members that vary something else **with the base's seed**, so that their
    difference from the base holds no second helping of the seed's variance; crossed, with every seed.

    Arguments:
        settings: The counts.
        root_seed: Root seed of the run.
        context_hash: Hash of data and model configuration, or one for each family, so that a change of
            the flow leaves the score's members valid.

    Returns:
        The members, the base first in each family.

    Raises:
        GalrayError: There is no member at all, or a family cannot vary what is asked of it.
    """
    for name in HEADS:
        _check_family(settings, name)
    hashes = dict(context_hash) if isinstance(context_hash, Mapping) else None
    specs: list[MemberSpec] = []
    for family_name, counts in settings.families().items():
        common = hashes[family_name] if hashes is not None else str(context_hash)
        specs += [
            MemberSpec(
                len(specs) + place,
                family_name,
                root_seed=root_seed,
                context_hash=common,
                variation=settings.variation(family_name, labels, root_seed),
                **labels,
            )
            for place, labels in enumerate(counts.labels)
        ]
    if not specs:
        raise GalrayError(
            "the ensemble has no members", "set ensemble.score.seeds (or another family's) to 1"
        )
    return specs


def _check_family(settings: EnsembleSettings, name: str) -> None:
    """Refuse what a family cannot vary."""
    family: FamilyDesign = getattr(settings, name)
    if not family.seeds:
        if any(count for factor, count in family.levels.items() if factor != "seed"):
            raise GalrayError(
                f"ensemble.{name} varies something but has seeds = 0, so no base to compare with",
                f"set ensemble.{name}.seeds = 1, or all its counts to 0",
            )
        return
    if name == "moments" and family.seeds > 1:
        raise GalrayError(
            f"ensemble.moments.seeds = {family.seeds}, but moments have no training seed",
            "set ensemble.moments.seeds = 1 (or 0 to leave the moments out)",
        )
    if name == "moments" and family.bootstraps:
        raise GalrayError(
            f"ensemble.moments.bootstraps = {family.bootstraps}, but a jackknife gives their statistics",
            "set ensemble.moments.bootstraps = 0",
        )
    if name != "score" and family.blocks == "sky":
        raise GalrayError(
            f'ensemble.{name}.blocks = "sky": only score networks can weigh patches of sky and keep their f',
            'set it to "stars"; the moments take gravity.moments.jackknife = "sky"',
        )
    if family.hyperparameters and not settings.own_hyperparameters(name):
        raise GalrayError(
            f"ensemble.{name}.hyperparameters = {family.hyperparameters}, but no key of it may vary",
            f'name one under [ensemble.hyperparameters], such as "{HEADS[name][0]}…"',
        )
    if family.selections > len(settings.selections):
        raise GalrayError(
            f"ensemble.{name}.selections = {family.selections}, but there are {len(settings.selections)}",
            "write the conditions into ensemble.selections",
        )
