"""What one task of a stage needs of its node, and how Ray is told."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from galray.settings import Settings

__all__ = ["TaskNeeds"]


class TaskNeeds(Settings):
    """Resources of one task, actor or member on one node."""

    cpus: float = Field(default=1, gt=0, description="CPUs.")
    gpus: float = Field(default=0, ge=0, description="GPUs, also a fraction: 0.25 lets four share one.")
    memory_gb: float = Field(
        default=0, ge=0, description="Memory in GB that Ray keeps free for it on its node; 0: not counted."
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description='Labels that its node must have, such as {"ray.io/node-group" = "gpu"}; also "!spot", '
        '"in(a, b)" as Ray\'s label selectors have it.',
    )

    def options(self) -> dict[str, Any]:
        """Keywords of ``ray.remote`` and ``.options``."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.memory_gb:
            options["memory"] = int(self.memory_gb * 1e9)
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options

    def bundle(self) -> dict[str, float]:
        """The same, without labels, as a bundle of a placement group."""
        bundle = {"CPU": self.cpus}
        if self.gpus:
            bundle["GPU"] = self.gpus
        if self.memory_gb:
            bundle["memory"] = int(self.memory_gb * 1e9)
        return bundle

    def missing(self, node: dict[str, Any]) -> str:
        """What a node of ``ray.nodes()`` can never give; empty where it suffices."""
        for name, need in self.bundle().items():
            have = node["Resources"].get(name, 0.0)
            if need > have + 1e-6:
                unit, scale = ("GB of memory", 1e9) if name == "memory" else (f"{name}s", 1.0)
                return f"{need / scale:g} {unit}, it has {have / scale:g}"
        for label, wanted in self.labels.items():
            if not _matches(node.get("Labels", {}).get(label), wanted):
                return f"the label {label} = {wanted}"
        return ""


def _matches(value: str | None, wanted: str) -> bool:
    """Whether a label's value is what a selector asks for."""
    if wanted.startswith("!"):
        return not _matches(value, wanted[1:])
    if wanted.startswith("in(") and wanted.endswith(")"):
        return value in [option.strip() for option in wanted[3:-1].split(",")]
    return value == wanted
