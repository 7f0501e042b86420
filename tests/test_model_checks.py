"""The checks of a run's models: the base member's, and one family against the other on unseen stars."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from galray.ensemble import EnsembleSettings, FamilyDesign, design, split_indices
from galray.model_checks import AGREEMENT, member_checks
from galray.phasespace import (
    Ball,
    BaseSettings,
    FlowPart,
    FlowSettings,
    NoiseSettings,
    ScoreSettings,
    attach_errors,
    build_model,
    load_model,
    posterior_stars,
    save_model,
)
from galray.phasespace.checks import agreement
from galray.training import TrainingSettings

BALL = Ball((0.0, 0.0, 0.0), 2.0)
PART = FlowPart(hidden=(8,), bins=2)
MODELS = {
    "flow": FlowSettings(position=PART, velocity=PART),
    "score": ScoreSettings(hidden=(8,), base=BaseSettings(hidden=(8,), star_passes=20_000)),
}


def stars(n=3000):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2 * n, 3))
    x = x[np.linalg.norm(x, axis=1) < 1.999][:n]
    return np.concatenate([x, 50.0 * rng.normal(size=(n, 3))], 1)


@pytest.fixture
def run(tmp_path):
    """A run of two members per family; only the base members' files are to be read."""
    fractions = {"flow": 0.2, "score": 0.3}
    config = SimpleNamespace(
        seed=5,
        training=SimpleNamespace(
            **{k: TrainingSettings(validation_fraction=f) for k, f in fractions.items()}
        ),
    )
    two = FamilyDesign(seeds=2, bootstraps=0, draws=0)
    specs = design(EnsembleSettings(flow=two, score=two, moments=FamilyDesign(seeds=0)), 5)
    w = torch.from_numpy(stars())
    for spec in specs:
        home = tmp_path / "members" / f"{spec.index:03d}"
        model = build_model(spec.family, MODELS[spec.family], BALL, w, seed=spec.seed)
        save_model(model, home / "model")
        (home / "checks.json").write_text(json.dumps({"E[s_vx]": {"value": spec.seed}}))
    store = SimpleNamespace(states=lambda dtype: stars().astype(dtype))
    return config, tmp_path, store, specs


def test_families_and_their_agreement(run):
    config, folder, store, specs = run
    found = member_checks(config, folder, store, specs)
    assert set(found) == {"flow", "score", AGREEMENT}
    assert found["flow"]["E[s_vx]"]["value"] == 0
    row = found[AGREEMENT]["difference of the scores"]
    split = specs[0].streams["split"]
    held = set(split_indices(3000, 0.2, split)[1]) & set(split_indices(3000, 0.3, split)[1])
    w = torch.from_numpy(stars()[sorted(held)].astype(np.float32)).double()
    assert 300 < len(w) < 700
    flow, score = (load_model(folder / "members" / name / "model") for name in ("000", "002"))
    assert row["value"] == pytest.approx(agreement(flow, score, w).value, rel=1e-9)
    assert row["error"] > 0


def test_one_family_alone_has_no_agreement(run):
    config, folder, store, specs = run
    (folder / "members" / "000" / "checks.json").unlink()
    assert set(member_checks(config, folder, store, specs)) == {"score"}


def test_deconvolved_models_are_compared_at_stars_without_errors(run, monkeypatch):
    """Where the stars of f are, not where their errors put them."""
    config, folder, store, specs = run
    covariance = np.diag([1e-4] * 3 + [900.0] * 3) * np.ones((3000, 1, 1))
    rows = attach_errors(stars(), covariance).numpy()
    monkeypatch.setattr("galray.member_stars.noisy_states", lambda store, spec: rows)
    seen = []
    monkeypatch.setattr(
        "galray.phasespace.checks.check_agreement", lambda a, b, w, seed: seen.append(w) or {}
    )
    member_checks(config, folder, store, specs)
    noise = NoiseSettings(treatment="deconvolve")
    for name, kind in (("000", "flow"), ("002", "score")):
        settings = MODELS[kind].model_copy(update={"noise": noise})
        save_model(
            build_model(kind, settings, BALL, torch.from_numpy(stars()), seed=0),
            folder / "members" / name / "model",
        )
    member_checks(config, folder, store, specs)
    measured, freed = seen
    split = specs[0].streams["split"]
    held = sorted(set(split_indices(3000, 0.2, split)[1]) & set(split_indices(3000, 0.3, split)[1]))
    flow = load_model(folder / "members" / "000" / "model")
    assert torch.equal(freed, posterior_stars(flow, torch.from_numpy(rows[held]), noise, seed=config.seed))
    assert measured.shape == freed.shape
    assert not torch.allclose(measured, freed)
