"""The registered model: positions in, gravity with errors out; MLflow runs this file to load the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
from mlflow.pyfunc import PythonModel

from galray.tracking.model import predict


class GravityModel(PythonModel):
    """The whole ensemble of a run: every member at every position, combined as the run's own tables are.

    Input: columns x, y, z in kpc (Galactocentric). Output: accelerations in (km/s)²/kpc, the potential in
    (km/s)² (zero at the Sun), densities in Msun/pc³, each with its error; NaN outside the ball of the stars.
    """

    def load_context(self, context: Any) -> None:
        """Open the run that lies among the model's artefacts: safetensors, TOML and JSON."""
        from galray.evaluation import RunSource

        self._source = RunSource(Path(context.artifacts["run"]))

    # Without type hints: MLflow would take them for the schema, which the logged signature gives.
    def predict(self, context, model_input, params=None):
        """Gravity at positions, a row for each."""
        return predict(self._source, np.column_stack([model_input[name] for name in ("x", "y", "z")]))


mlflow.models.set_model(GravityModel())
