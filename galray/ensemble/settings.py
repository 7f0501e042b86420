"""How an ensemble is configured: how many members vary what, and how they add up to an error budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from galray.cluster.needs import TaskNeeds
from galray.ensemble.search_space import SearchRange
from galray.seeds import seed_sequence
from galray.settings import Settings

__all__ = ["FACTORS", "HEADS", "BudgetSettings", "EnsembleSettings", "FamilyDesign", "SystematicsSettings"]

FACTORS = ("seed", "bootstrap", "draw", "systematic", "hyperparameter", "selection")
"""What members may differ by; each is a label that counts from 0, the base's choice."""

HEADS = {
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
    draws: int = Field(
        default=0,
        ge=0,
        description="Redraws of the measurement errors. Set catalog.ball.margin_kpc to about three errors of "
        "distance at the border of the ball: without it stars leave the ball and none comes in, which shifts "
        "the result as no error does. One or two cannot tell a shift from their own scatter, and the budget "
        "is wide for it; take four or more.",
    )
    systematics: int = Field(
        default=0,
        ge=0,
        description="Draws of the parallax zero point and the Sun's motion, common to all stars; as redraws, "
        "they need catalog.ball.margin_kpc.",
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
        heads = sorted({head for own in HEADS.values() for head in own})
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
        return {key: one for key, one in self.hyperparameters.items() if key.startswith(HEADS[family])}

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
