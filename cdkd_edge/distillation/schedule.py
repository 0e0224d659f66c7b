"""How much the parts of the loss count, by how the two reconstructions compare.

The Mask-CDKD paper weighs distillation, the teacher's and the student's reconstruction by three stages. Early in a run
both reconstructions count most; when the teacher reconstructs clearly better than the student, the student has
something to learn from it, and distillation counts most; when the student has caught up, it counts even more.

The paper's bands of the ratio overlap. As in its published code, stages follow one another and never go back. That code
decides by a single batch of a single process; here the ratio is a running mean over all processes, and a stage lasts at
least :data:`LEAST_STEPS` steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = ("early", "middle", "late")
WEIGHTS = {  # of distillation, the teacher's and the student's reconstruction
    "early": (0.20, 0.40, 0.40),
    "middle": (0.60, 0.20, 0.20),
    "late": (0.70, 0.15, 0.15),
}
MIDDLE_BELOW = 0.85  # the ratio of the teacher's to the student's reconstruction loss
LATE_ABOVE = 0.95
LEAST_STEPS = 200
_DECAY = 0.99  # of the running mean of the ratio


@dataclass
class Schedule:
    """The stage of a run, step by step. Everything that resuming needs is in its fields."""

    stage: str = "early"
    since: int = 0  # step at which the stage began
    ratio: float | None = None  # running mean of the teacher's over the student's reconstruction loss
    steps: int = 0
    transitions: list[dict[str, Any]] = field(default_factory=list)  # ``stage``, ``step`` and ``ratio`` of each

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of distillation, the teacher's and the student's reconstruction; they sum to 1."""
        return WEIGHTS[self.stage]

    def update(self, teacher: float, student: float) -> None:
        """Take in the reconstruction losses of a step, means over all processes."""
        self.steps += 1
        keep = min(_DECAY, 1 - 1 / self.steps)  # a plain mean at first
        ratio = teacher / max(student, 1e-12)
        self.ratio = ratio if self.ratio is None else keep * self.ratio + (1 - keep) * ratio
        if self.steps - self.since < LEAST_STEPS:
            return
        if (self.stage == "early" and self.ratio < MIDDLE_BELOW) or (
            self.stage == "middle" and self.ratio > LATE_ABOVE
        ):
            self.stage = STAGES[STAGES.index(self.stage) + 1]
            self.since = self.steps
            self.transitions.append({"stage": self.stage, "step": self.steps, "ratio": self.ratio})
