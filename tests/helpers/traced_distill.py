"""``cdkd-edge`` with a schedule of few steps, that leaves what each process of ``torchrun`` knows in ``$TRACES``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cdkd_edge import cli
from cdkd_edge.distillation import distill, schedule


def quick_stages(patch: Any) -> None:
    """A schedule that goes through all its stages in a few steps; ``patch`` sets attributes."""
    patch(schedule, "LEAST_STEPS", 2)
    patch(schedule, "MIDDLE_BELOW", 9.0)
    patch(schedule, "LATE_ABOVE", 0.0)


class TracedDistilling(distill._Distilling):
    """Leaves its schedule and its last measures in a file."""

    def finish(self) -> Any:
        """See there."""
        result = super().finish()
        trace = {"schedule": vars(self.distiller.schedule), "measures": self.distiller.measures}
        path = Path(os.environ["TRACES"]) / f"{self.ranks.rank}.json"
        path.write_text(json.dumps(trace), encoding="utf-8")
        return result


if __name__ == "__main__":
    quick_stages(setattr)
    distill._Distilling = TracedDistilling
    cli.app()
