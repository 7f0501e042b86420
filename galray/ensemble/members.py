"""What the members of an ensemble are: one base per family and members that vary one thing each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from galray.errors import GalrayError
from galray.seeds import seed_for
from galray.settings import Settings

__all__ = ["BudgetSettings", "EnsembleSettings", "FamilyDesign", "MemberSpec", "design"]


class FamilyDesign(Settings):
    """How many members of one family vary what; all others share the base member's choices."""

    seeds: int = Field(default=1, ge=0, description="Trainings with different seeds, the base among them.")
    bootstraps: int = Field(
        default=0, ge=0, description="Bootstraps over the stars, each trained with the base's seed."
    )
    draws: int = Field(
        default=0, ge=0, description="Redraws of the measurement errors, each trained with the base's seed."
    )

    @property
    def count(self) -> int:
        """Number of members of the family."""
        return self.seeds + self.bootstraps + self.draws if self.seeds else 0


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
    concurrent: int | None = Field(
        default=None,
        ge=0,
        description="Members at the same time; absent: all the cluster holds, 0: one by one in process.",
    )
    cpus_per_member: float = Field(default=1, gt=0, description="CPUs of a member.")
    gpus_per_member: float = Field(
        default=0, ge=0, description="GPUs of a member, also a fraction: 0.25 lets four share one."
    )
    threads: int = Field(default=1, ge=1, description="Threads of torch and of linear algebra in a member.")
    max_crashes: int = Field(
        default=2, ge=0, description="How often a member is started again after its process died."
    )
    budget: BudgetSettings = Field(default=BudgetSettings(), description="From members to an error budget.")

    def families(self) -> dict[str, FamilyDesign]:
        """Give the designs of the families that have members, in their order."""
        designs = {"flow": self.flow, "score": self.score, "moments": self.moments}
        return {name: family for name, family in designs.items() if family.count}


@dataclass(frozen=True)
class MemberSpec:
    """One member: what it varies, and the address of its contents.

    `seed`, `bootstrap` and `draw` are labels that count from the base (seed 0; bootstrap 0 is the full
    sample; draw 0 the observed values); `streams` turns them into numbers for random generators.

    Arguments:
        index: Place in the ensemble and number of the member's folder; no part of its identity.
        family: "flow", "score" or "moments".
        seed: Label of the training seed.
        bootstrap: Label of the bootstrap over stars, 0 for none.
        draw: Label of the redraw of measurement errors, 0 for none.
        root_seed: Root seed of the run.
        context_hash: Hash of all else that the result depends on: data manifest, model configuration.
    """

    index: int
    family: str
    seed: int = 0
    bootstrap: int = 0
    draw: int = 0
    root_seed: int = 0
    context_hash: str = ""

    @property
    def id(self) -> str:
        """Content hash: equal for members that would give the same result, whatever their index."""
        content = [self.family, self.seed, self.bootstrap, self.draw, self.root_seed, self.context_hash]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def varied(self) -> str:
        """What sets the member apart from the base: "base", "seed", "bootstrap", "draw" or a sum of them."""
        parts = [name for name in ("seed", "bootstrap", "draw") if getattr(self, name)]
        return "+".join(parts) or "base"

    @property
    def name(self) -> str:
        """Short name for people, such as "score-007 bootstrap 1"."""
        parts = [
            f"{name} {getattr(self, name)}" for name in ("seed", "bootstrap", "draw") if getattr(self, name)
        ]
        return f"{self.family}-{self.index:03d} {' '.join(parts) or 'base'}"

    @property
    def tags(self) -> dict[str, str]:
        """Tags for the tracker: identity and what was varied."""
        return {
            "galray.member": self.id,
            "galray.index": str(self.index),
            "galray.family": self.family,
            "galray.varied": self.varied,
            "galray.seed": str(self.seed),
            "galray.bootstrap": str(self.bootstrap),
            "galray.draw": str(self.draw),
        }

    @property
    def streams(self) -> dict[str, int | None]:
        """Seeds of the member's random streams.

        `split` (training or validation) is one for the whole run, so that a bootstrap never mixes the
        two; `training` depends on family and seed; `bootstrap` and `draw` are shared between families,
        so that methods see the same resampled stars and one redrawn catalogue serves all of them; they
        are None where nothing is resampled or redrawn.
        """
        return {
            "split": seed_for(self.root_seed, "split"),
            "training": seed_for(self.root_seed, "training", self.family, self.seed),
            "bootstrap": seed_for(self.root_seed, "bootstrap", self.bootstrap) if self.bootstrap else None,
            "draw": seed_for(self.root_seed, "draw", self.draw) if self.draw else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Give the spec as JSON-ready values, with its id, name and streams."""
        return {
            "index": self.index,
            "family": self.family,
            "seed": self.seed,
            "bootstrap": self.bootstrap,
            "draw": self.draw,
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
        names = ("index", "family", "seed", "bootstrap", "draw", "root_seed", "context_hash")
        return cls(**{name: values[name] for name in names})


def design(
    settings: EnsembleSettings, root_seed: int, context_hash: str | Mapping[str, str] = ""
) -> list[MemberSpec]:
    """Lay out the ensemble, one factor at a time.

    Each family has a base (seed 0, all stars, observed values), further seeds on the same data, and
    bootstraps and error redraws **with the base's seed**, so that their difference from the base holds
    no second helping of the seed's variance.

    Arguments:
        settings: The counts.
        root_seed: Root seed of the run.
        context_hash: Hash of data and model configuration, or one for each family, so that a change of
            the flow leaves the score's members valid.

    Returns:
        The members, the base first in each family.

    Raises:
        GalrayError: There is no member at all, or moments are asked for several seeds.
    """
    if settings.moments.seeds > 1:
        raise GalrayError(
            f"ensemble.moments.seeds = {settings.moments.seeds}, but moments have no training seed",
            "set ensemble.moments.seeds = 1 (or 0 to leave the moments out)",
        )
    for name in ("flow", "score", "moments"):
        family: FamilyDesign = getattr(settings, name)
        if not family.seeds and (family.bootstraps or family.draws):
            raise GalrayError(
                f"ensemble.{name} has bootstraps or draws but seeds = 0, so no base to compare with",
                f"set ensemble.{name}.seeds = 1, or all three to 0",
            )
    hashes = dict(context_hash) if isinstance(context_hash, Mapping) else None
    specs: list[MemberSpec] = []
    for family_name, counts in settings.families().items():
        common = hashes[family_name] if hashes is not None else str(context_hash)
        labels = [(seed, 0, 0) for seed in range(counts.seeds)]
        labels += [(0, bootstrap, 0) for bootstrap in range(1, counts.bootstraps + 1)]
        labels += [(0, 0, draw) for draw in range(1, counts.draws + 1)]
        specs += [
            MemberSpec(len(specs) + place, family_name, *label, root_seed=root_seed, context_hash=common)
            for place, label in enumerate(labels)
        ]
    if not specs:
        raise GalrayError(
            "the ensemble has no members", "set ensemble.score.seeds (or another family's) to 1"
        )
    return specs


def by_family(specs: Iterable[MemberSpec]) -> dict[str, list[MemberSpec]]:
    """Group specs by family, in their order."""
    groups: dict[str, list[MemberSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.family, []).append(spec)
    return groups
