"""Where a run is recorded in MLflow."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import Field, field_validator

from galray.settings import Settings

__all__ = ["TrackingSettings", "without_password"]

_PASSWORD = re.compile(r"(?<=://)([^:@/\s]*):[^@/\s]*@")


def without_password(text: str) -> str:
    """A text with the passwords of its URLs left out, for logs and files."""
    return _PASSWORD.sub(r"\1:***@", text)


class TrackingSettings(Settings):
    """The MLflow store and what goes into it."""

    enabled: bool = Field(default=True, description="Record runs in MLflow.")
    uri: str = Field(
        default="",
        description='Tracking URI, such as "http://mlflow:5000"; "" takes MLFLOW_TRACKING_URI, and without '
        "it the sqlite file mlflow.db beside the run directory.",
    )
    experiment: str = Field(default="galray", min_length=1, description="Name of the experiment.")
    artifacts: str = Field(
        default="",
        description='Where a new experiment keeps artefacts; "" is the folder mlartifacts beside the run '
        "directory for sqlite, and the server's choice for a server.",
    )
    weights: bool = Field(default=True, description="Store the members' weights as artefacts.")
    system_seconds: float = Field(
        default=30,
        ge=0,
        description="Seconds between records of CPU, memory, disk, network and GPUs of the machine that "
        "drives the run; 0 records none.",
    )
    patience: float = Field(
        default=120,
        gt=0,
        description="Seconds that the end of a run waits for MLflow; what is left is written on in the "
        "background.",
    )

    @field_validator("uri", "artifacts")
    @classmethod
    def _no_password(cls, value: str) -> str:
        # The configuration goes into the run directory, the report and MLflow itself.
        if _PASSWORD.search(value):
            raise ValueError(
                f"'{without_password(value)}' holds a password, which a configuration must not: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole MLFLOW_TRACKING_URI, in "
                "the environment"
            )
        return value

    def resolve_uri(self, folder: Path) -> str:
        """Give the tracking URI of a run directory, relative sqlite paths made absolute."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            return f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"
        scheme, separator, path = uri.partition(":///")
        if scheme == "sqlite" and separator and path and not path.startswith(("/", ":memory:")):
            return f"sqlite:///{Path(path).absolute()}"
        return uri

    def resolve_artifacts(self, folder: Path) -> str | None:
        """Give the artefact root of a new experiment; None leaves it to the server."""
        if self.artifacts:
            return self.artifacts if "://" in self.artifacts else Path(self.artifacts).absolute().as_uri()
        if self.resolve_uri(folder).startswith("sqlite"):
            # Relative roots would end in whatever folder the first process happened to run in.
            return (folder.absolute().parent / "mlartifacts").as_uri()
        return None
