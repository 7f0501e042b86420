"""Settings of the weak-form moments: splines, tests, functions of velocity, selection, noise, penalty."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = ["MomentsSettings", "check_concentration"]


def check_concentration(value: tuple[float, ...], dimension: int) -> None:
    """Refuse a concentration of cells that has not one number from 0 to 6 for each coordinate."""
    if value and (len(value) != dimension or min(value) < 0 or max(value) > 6):
        raise ValueError(f"concentration: give {dimension} numbers from 0 to 6")


class MomentsSettings(Settings):
    """The weak-form moment estimator: splines of the potential, test functions, penalty."""

    basis: Literal["Rz", "xyz", "Rz+xyz"] = "Rz"
    """Splines in (R, z), an axially symmetric potential; in (x, y, z), which assumes no symmetry; or both
    side by side, the (x, y, z) part shrunk towards none by a penalty whose strength the data choose."""
    num_potential_splines: tuple[int, ...] = ()
    """Splines of Φ along each coordinate; () takes (8, 15) for Rz and Rz+xyz, and (7, 7, 9) for xyz. An odd
    number puts a break in the middle, where a Galaxy is sharpest; even numbers do much worse there."""
    num_departure_splines: tuple[int, ...] = ()
    """Splines of the (x, y, z) part of Rz+xyz along each coordinate; () takes (7, 7, 7)."""
    num_test_splines: tuple[int, ...] = ()
    """Test functions along each coordinate; () takes (10, 23) for Rz and Rz+xyz, and (8, 8, 11) for xyz.
    Where a selection is solved for it takes five sixths of the splines of Φ: what tells Φ from ε is little,
    and more moments add more noise to it than they tell."""
    num_departure_tests: tuple[int, ...] = ()
    """Test functions in (x, y, z) of Rz+xyz along each coordinate; () takes (7, 7, 9)."""
    velocity_functions: tuple[str, ...] = ()
    """Functions of velocity that multiply the test functions: products such as "v_R v_z", or "1"; () takes
    the first moments of the basis, and where a selection is solved for those up to order 3, in (R, z) the odd
    ones. The (x, y, z) part of Rz+xyz always takes v_x, v_y and v_z, and "1" where a pattern speed is
    fitted."""
    velocity_window: float = Field(default=80.0, gt=0)
    """s in km/s of the factor exp(−v_z²/2s²) of all functions of velocity: hot stars, which hold most of the
    noise, then count little. Take it well above the dispersion of what you study: far above, it leaves the
    functions as they are. On disc mocks of 20,000 to a million stars 80 km/s halved the error of a_z."""
    concentration: tuple[float, ...] = ()
    """β per coordinate: spline cells shrink towards the plane z = 0, and along x and y towards the centre
    (break points ∝ sinh(βt)); 0 gives equal cells; () takes (0, 2) for Rz and Rz+xyz, and (0, 0, 2) for
    xyz."""
    window: float = Field(default=0.5, ge=0, lt=1)
    """The window on |x − centre| is 1 up to this fraction of the radius and falls to 0 at the border."""
    north_south: bool = False
    """Force Φ(z) = Φ(−z)."""
    penalty: float | Literal["cv", "cv_1se", "cp", "evidence"] = "cv"
    """Strength of the third-difference penalty, or how to choose it: cross-validation over blocks, the
    strongest that it does not tell from its best (one standard error), Mallows' C_p, or the marginal
    likelihood of the moments."""
    penalty_steps: int = Field(default=7, ge=2, le=30)
    """Strengths tried in the coarse scan when the penalty is chosen."""
    min_stars: int = Field(default=30, ge=2)
    """Test functions that rest on fewer stars are left out."""
    noise: Literal["ignore", "deconvolve"] = "ignore"
    """``ignore``: gravity of the stars as measured; ``deconvolve``: each moment less what the stars' errors
    add to it to first order in their covariances, −½ C:∇∇g, for some four times the cost."""
    selection: Literal["known", "shared", "each"] = "known"
    """Solve for the selection efficiency ε(x) too: one of all tracer populations, or one of each. ``known``
    takes it as constant, or as given with the stars."""
    selection_basis: Literal["", "Rz", "xyz"] = ""
    """Coordinates of log ε; "" takes those of the velocity functions. Dust has no symmetry of Φ's."""
    num_selection_splines: tuple[int, ...] = ()
    """Splines of log ε along each coordinate; () takes (6, 9) in (R, z) and (5, 5, 7) in (x, y, z)."""
    selection_concentration: tuple[float, ...] = ()
    """β per coordinate of the cells of log ε; () takes that of Φ, or (0, 0, 2) in (x, y, z)."""
    selection_amplitude: float = Field(default=2.0, gt=0)
    """Standard deviation of log ε beforehand: what keeps it finite where the stars cannot tell it from Φ."""
    selection_monotone: bool = False
    """Let ε nowhere grow with the distance from the centre of the ball, as behind dust."""
    selection_cells_kpc: float | None = Field(default=None, gt=0)
    """Side of cells in which stars are counted first: weighed so that the counts are axially symmetric, they
    leave an ε(R, z) to solve for, and a map of ε in these cells follows. None: stars are not weighed."""
    pattern_speed: float | Literal["fit"] = 0.0
    """Ω about the Galactic centre, in km/s/kpc and positive along Galactic rotation, of the frame in which
    the stars are stationary; ``fit`` measures it, where the stars are not so axially symmetric that it
    cannot be known."""
    positive_mass: bool = False
    """Force ρ ≥ 0 at the nodes of a grid over the ball."""
    jackknife: Literal["shards", "sky"] = "shards"
    """Blocks of the jackknife: the shards, which are random parts of the stars, or smooth patches of sky."""
    num_patches: int = Field(default=12, ge=3, le=200)
    """Patches of the jackknife over the sky."""
    num_blocks: int = Field(default=40, ge=3, le=1000)
    """Shards are added up to at most this many blocks, for cross-validation and jackknife."""

    @model_validator(mode="after")
    def _sizes(self) -> MomentsSettings:
        plane = 3 if self.basis == "xyz" else 2
        seen = 3 if self.selection_family == "xyz" else 2
        for name, dimension in (
            ("num_potential_splines", plane),
            ("num_test_splines", plane),
            ("num_selection_splines", seen),
            ("num_departure_splines", 3),
            ("num_departure_tests", 3),
        ):
            sizes = getattr(self, name)
            if sizes and (len(sizes) != dimension or min(sizes) < 4):
                raise ValueError(f"{name}: the {self.basis} basis takes {dimension} numbers of at least 4")
        check_concentration(self.concentration, plane)
        check_concentration(self.selection_concentration, seen)
        if not isinstance(self.penalty, str) and not self.penalty >= 0:
            raise ValueError("penalty: a strength cannot be negative")
        for name in self.velocity_functions:
            from galray.gravity.velocity_functions import check_function

            try:
                check_function(name, self.family)
            except ValueError as error:
                raise ValueError(f"velocity_functions: {error}") from None
        if self.basis == "Rz" and self.pattern_speed != 0.0:
            raise ValueError(
                "pattern_speed: an axially symmetric potential looks the same in every rotating frame; "
                "set basis = 'xyz' or 'Rz+xyz'"
            )
        if self.selection_cells_kpc and (self.selection == "known" or self.selection_family != "Rz"):
            raise ValueError("selection_cells_kpc: goes with selection = 'shared' in (R, z)")
        if self.pattern_speed == "fit" and self.selection != "known":
            raise ValueError("pattern_speed: 'fit' and an unknown selection are not solved for together")
        if self.noise != "ignore" and self.jackknife == "sky":
            raise ValueError("noise: 'deconvolve' goes with jackknife = 'shards'")
        if self.noise != "ignore" and (
            self.basis == "Rz+xyz" or self.selection != "known" or self.pattern_speed
        ):
            raise ValueError(
                "noise: 'deconvolve' goes with the Rz or xyz basis, a known selection and no pattern speed"
            )
        return self

    @property
    def family(self) -> Literal["Rz", "xyz"]:
        """The components of velocity of `functions`."""
        return "xyz" if self.basis == "xyz" else "Rz"

    @property
    def selection_family(self) -> Literal["Rz", "xyz"]:
        """The coordinates of log ε, default filled in."""
        return self.selection_basis or self.family

    @property
    def potential_splines(self) -> tuple[int, ...]:
        """The number of potential splines along each coordinate, defaults filled in."""
        return self.num_potential_splines or ((7, 7, 9) if self.basis == "xyz" else (8, 15))

    @property
    def test_splines(self) -> tuple[int, ...]:
        """The number of test functions along each coordinate, defaults filled in."""
        if self.num_test_splines:
            return self.num_test_splines
        if self.selection != "known":
            return tuple(max(n - n // 6, 4) for n in self.potential_splines)
        return (8, 8, 11) if self.basis == "xyz" else (10, 23)

    @property
    def departure_splines(self) -> tuple[int, ...]:
        """The number of splines of the (x, y, z) part of Rz+xyz, defaults filled in."""
        return self.num_departure_splines or (7, 7, 7)

    @property
    def departure_tests(self) -> tuple[int, ...]:
        """The number of test functions of the (x, y, z) part of Rz+xyz, defaults filled in."""
        return self.num_departure_tests or (7, 7, 9)

    @property
    def selection_splines(self) -> tuple[int, ...]:
        """The number of splines of log ε along each coordinate, defaults filled in."""
        return self.num_selection_splines or ((5, 5, 7) if self.selection_family == "xyz" else (6, 9))

    @property
    def selection_concentrations(self) -> tuple[float, ...]:
        """The concentration of log ε along each coordinate, defaults filled in."""
        if self.selection_concentration:
            return self.selection_concentration
        return (0.0, 0.0, 2.0) if self.selection_family == "xyz" else self.concentrations

    @property
    def concentrations(self) -> tuple[float, ...]:
        """The concentration along each coordinate, defaults filled in."""
        return self.concentration or ((0.0, 0.0, 2.0) if self.basis == "xyz" else (0.0, 2.0))

    @property
    def functions(self) -> tuple[str, ...]:
        """The velocity functions, defaults filled in: more orders where a selection is solved for."""
        from galray.gravity.velocity_functions import up_to_order

        if self.velocity_functions:
            return self.velocity_functions
        if self.selection != "known":
            names = up_to_order(self.family, 3)
            if self.family == "Rz":
                # The even ones have no coefficients where v_R and v_z are as often up as down.
                return tuple(n for n in names if (n.count("v_R") + n.count("v_z")) % 2)
            return names
        if self.family == "Rz":
            return ("v_R", "v_z")
        return ("1", "v_x", "v_y", "v_z") if self.pattern_speed == "fit" else ("v_x", "v_y", "v_z")
