"""What the members of an ensemble are: one base per family and members that vary one thing, or several."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from galray.cluster.needs import TaskNeeds
from galray.ensemble.search_space import SearchRange
from galray.errors import GalrayError
from galray.seeds import seed_for, seed_sequence
from galray.settings import Settings

__all__ = [
    "FACTORS",
    "BudgetSettings",
    "EnsembleSettings",
    "FamilyDesign",
    "MemberSpec",
    "SystematicsSettings",
    "design",
]

FACTORS = ("seed", "bootstrap", "draw", "systematic", "hyperparameter", "selection")
"""What members may differ by; each is a label that counts from 0, the base's choice."""

_HEADS = {
    "flow": ("flow.", "training.flow.", "gravity.potential."),
    "score": ("score.", "training.score.", "gravity.potential."),
    "moments": ("gravity.moments.",),
}
"""Keys of the configuration that are a family's own."""


class FamilyDesign(Settings):
    """How many members of one family vary what.

    One factor at a time, a member that varies something shares all else with the base, seed included;
    crossed, every choice of one factor meets every choice of the others, and an analysis of variance tells
    their effects from what the training adds to each member by itself.
    """

    seeds: int = Field(default=1, ge=0, description="Trainings with different seeds, the base among them.")
    bootstraps: int = Field(default=0, ge=0, description="Bootstraps over the stars.")
    blocks: Literal["stars", "sky"] = Field(
        default="stars",
        description="What a bootstrap draws: single stars, or smooth patches of sky with all their stars "
        "(score networks only; the moments have a jackknife over patches).",
    )
    draws: int = Field(default=0, ge=0, description="Redraws of the measurement errors.")
    systematics: int = Field(
        default=0,
        ge=0,
        description="Draws of the parallax zero point and the Sun's motion, common to all stars.",
    )
    hyperparameters: int = Field(
        default=0, ge=0, description="Draws from ensemble.hyperparameters, as far as they are the family's."
    )
    selections: int = Field(default=0, ge=0, description="How many of ensemble.selections are tried.")
    crossed: bool = Field(default=False, description="Every choice with every other, not one at a time.")

    @property
    def levels(self) -> dict[str, int]:
        """Number of choices of each factor beside the base's."""
        counts = (self.seeds - 1, self.bootstraps, self.draws, self.systematics, self.hyperparameters)
        return dict(zip(FACTORS, (*counts, self.selections), strict=True))

    @property
    def labels(self) -> list[dict[str, int]]:
        """The labels of every member, the base first; none without a seed."""
        if not self.seeds:
            return []
        if self.crossed:
            ranges = [range(count + 1) for count in self.levels.values()]
            return [dict(zip(FACTORS, choice, strict=True)) for choice in itertools.product(*ranges)]
        base = dict.fromkeys(FACTORS, 0)
        ones = [base | {name: i + 1} for name, count in self.levels.items() for i in range(count)]
        return [base, *ones]

    @property
    def count(self) -> int:
        """Number of members of the family."""
        return len(self.labels)


class SystematicsSettings(Settings):
    """Published errors of what is common to all stars."""

    zero_point_error_mas: float = Field(
        default=0.005,
        ge=0,
        description="Of the parallax zero point once it is corrected for: a few microarcseconds (Lindegren "
        "et al. 2021, A&A 649, A4).",
    )
    solar_motion_error_km_s: tuple[float, float, float] = Field(
        default=(3.0, 1.4, 0.09),
        description="Of the Sun's Galactocentric velocity (Drimmel & Poggio 2018, RNAAS 2, 210).",
    )

    def draw(self, seed: int) -> tuple[float, tuple[float, float, float]]:
        """One draw: shift of the zero point in mas, and of the Sun's velocity in km/s."""
        normal = np.random.default_rng(seed).standard_normal(4)
        x, y, z = (normal[1:] * self.solar_motion_error_km_s).tolist()
        return float(normal[0] * self.zero_point_error_mas), (x, y, z)


class BudgetSettings(Settings):
    """How members become an error budget and methods one value."""

    correct_measurement_bias: bool = Field(
        default=False,
        description="Subtract, to first order, the shift that redrawn measurement errors cause.",
    )
    measurement_within_statistics: bool = Field(
        default=True,
        description="The error draws are independent from star to star, so that a bootstrap or jackknife "
        "holds them too; false for draws of common systematics.",
    )
    expect_measurement: bool = Field(
        default=True, description="Report the measurement term as missing when there are no redraws."
    )
    seed_correlation: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Correlation of the training noise of two members that share a seed but not the data: at "
        "1 their difference is free of it, at 0 it holds that of both, which is taken out again. Measure "
        "it with trainings on nearly the same stars; 1 is the cautious choice (wider bands).",
    )
    prior_dof: float = Field(
        default=4.0,
        ge=0,
        description="Most degrees of freedom that similar quantities may lend to the variance of one.",
    )
    outlier_threshold: float = Field(
        default=10.0,
        gt=3,
        description="A member is left out, and reported, when the median over quantities of its distance "
        "from the members' median exceeds so many robust standard deviations (of at least 5 members).",
    )
    max_weight: float = Field(
        default=0.7, gt=0, le=1, description="Largest weight of one method in the combination."
    )


class EnsembleSettings(Settings):
    """The members of a run and how they are run."""

    flow: FamilyDesign = Field(
        default=FamilyDesign(seeds=2, bootstraps=1, draws=1),
        description="Members of the flow; seeds = 0: none.",
    )
    score: FamilyDesign = Field(
        default=FamilyDesign(seeds=2, bootstraps=1, draws=1),
        description="Members of the score network; seeds = 0: none.",
    )
    moments: FamilyDesign = Field(
        default=FamilyDesign(seeds=1, bootstraps=0, draws=2),
        description="Members of the moments; they have no seed, and a jackknife gives their statistics.",
    )
    systematics: SystematicsSettings = Field(
        default=SystematicsSettings(), description="What members with systematics draw from."
    )
    hyperparameters: dict[str, SearchRange] = Field(
        default_factory=dict,
        description="What members with other hyperparameters draw from: dotted keys of a family or its "
        "training, of gravity.potential (networks) or of gravity.moments, each with a list of values or low "
        "and high.",
    )
    selections: tuple[str, ...] = Field(
        default=(),
        description="Selections of stars to try, as SQL conditions on the columns of the shards, such as "
        '"parallax > 10 * parallax_error".',
    )
    sky_patches: int = Field(
        default=24, ge=6, le=400, description='Patches of sky that a bootstrap with blocks = "sky" draws.'
    )
    smoothing_widths: tuple[float, ...] = Field(
        default=(),
        description="Widths of the density kernel to try, in units of the run's own and below 1: what the "
        "density has to do with its smoothing becomes a term, extrapolated to no smoothing.",
    )
    concurrent: int | None = Field(
        default=None,
        ge=0,
        description="Members at the same time; absent: all the cluster holds, 0: one by one in process.",
    )
    cpus_per_member: float = Field(default=1, gt=0, description="CPUs of a member.")
    gpus_per_member: float = Field(
        default=0, ge=0, description="GPUs of a member, also a fraction: 0.25 lets four share one."
    )
    memory_gb_per_member: float = Field(
        default=0,
        ge=0,
        description="Memory in GB that Ray keeps free for a member on its node; 0: not counted.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of the nodes for members, as in cluster.tasks.labels.",
    )
    threads: int = Field(default=1, ge=1, description="Threads of torch and of linear algebra in a member.")
    max_crashes: int = Field(
        default=2, ge=0, description="How often a member is started again after its process died."
    )
    budget: BudgetSettings = Field(default=BudgetSettings(), description="From members to an error budget.")

    @field_validator("hyperparameters")
    @classmethod
    def _known_heads(cls, value: dict[str, SearchRange]) -> dict[str, SearchRange]:
        heads = sorted({head for own in _HEADS.values() for head in own})
        for key in value:
            if not key.startswith(tuple(heads)):
                raise ValueError(f"'{key}' belongs to no family; keys begin with {', '.join(heads)}")
        return value

    @field_validator("smoothing_widths")
    @classmethod
    def _narrower(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.3 <= width <= 0.95 for width in value):
            raise ValueError(f"{list(value)}: widths between 0.3 and 0.95 of the run's own kernel")
        return value

    def own_hyperparameters(self, family: str) -> dict[str, SearchRange]:
        """The keys that a family's members with other hyperparameters draw."""
        return {key: one for key, one in self.hyperparameters.items() if key.startswith(_HEADS[family])}

    def variation(self, family: str, labels: Mapping[str, int], root_seed: int) -> dict[str, Any]:
        """What the labels of a member mean beside its random streams: part of its content.

        Arguments:
            family: Its family.
            labels: Its labels by factor.
            root_seed: Root seed of the run.

        Returns:
            ``patches`` of a bootstrap over the sky, ``systematics`` (errors), ``choices`` of hyperparameters
            by dotted key, ``where`` (a condition); each only where it is varied.
        """
        found: dict[str, Any] = {}
        if labels["bootstrap"] and getattr(self, family).blocks == "sky":
            found["patches"] = self.sky_patches
        if labels["systematic"]:
            found["systematics"] = self.systematics.model_dump(mode="json")
        if level := labels["hyperparameter"]:
            rng = np.random.default_rng(seed_sequence(root_seed, "hyperparameters", family, level))
            own = self.own_hyperparameters(family)
            found["choices"] = {key: own[key].draw(rng) for key in sorted(own)}
        if level := labels["selection"]:
            found["where"] = self.selections[level - 1]
        return found

    @property
    def needs(self) -> TaskNeeds:
        """What one member needs of its node."""
        return TaskNeeds(
            cpus=self.cpus_per_member,
            gpus=self.gpus_per_member,
            memory_gb=self.memory_gb_per_member,
            labels=self.labels,
        )

    def families(self) -> dict[str, FamilyDesign]:
        """Give the designs of the families that have members, in their order."""
        designs = {"flow": self.flow, "score": self.score, "moments": self.moments}
        return {name: family for name, family in designs.items() if family.count}


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
    for name in _HEADS:
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
            f'name one under [ensemble.hyperparameters], such as "{_HEADS[name][0]}…"',
        )
    if family.selections > len(settings.selections):
        raise GalrayError(
            f"ensemble.{name}.selections = {family.selections}, but there are {len(settings.selections)}",
            "write the conditions into ensemble.selections",
        )


def by_family(specs: Iterable[MemberSpec]) -> dict[str, list[MemberSpec]]:
    """Group specs by family, in their order."""
    groups: dict[str, list[MemberSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.family, []).append(spec)
    return groups
