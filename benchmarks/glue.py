"""How long the slots of a benchmark are idle between two of their jobs.

    python benchmarks/glue.py [STEPS]

Four trainings with what follows from them, on two slots of the CPU; times are those of the ledger. Real files are used
where GLUE_DIR is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import describe_machine
from records import keep

from lightning_glue.pipeline.ledger import Ledger, idle

COMMAND = [
    "--tasks", "RTE WNLI", "--seeds", "2", "--model", "minilm", "--gpus", "0", "--workers", "2", "--name", "idle",
    "--data", "glue" if os.environ.get("GLUE_DIR") else "sample", "tracking.system_metrics_seconds=null",
]  # fmt: skip


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_glue.glue", *COMMAND, f"trainer.max_steps={steps}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the benchmark failed:\n{done.stderr}")
        ledger = Ledger(Path(folder) / "mlruns" / ".glue" / "idle" / "ledger.jsonl")
        ledger.refresh()
    found, jobs = idle(ledger.events), sum(event["state"] == "done" for event in ledger.events)
    given, waited = (f"{part:.2f} s ({100 * part / found.total:.2f} %)" for part in (found.given, found.waited))
    print(
        f"{jobs} jobs, {steps} steps in each training: {found.total:.1f} s of slots; "
        f"idle between jobs {given}, waiting for what a job needs {waited}"
    )
    keep({"idle between jobs / all": found.given / found.total, "waiting / all": found.waited / found.total})


if __name__ == "__main__":
    main()
