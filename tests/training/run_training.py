"""`python run_training.py CONFIG.json`: a training process that tests can start or kill."""

import json
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / "src")]
    warnings.filterwarnings("ignore")
    from cpu_layouts import allow_cpu_layouts

    allow_cpu_layouts()
    from lenvm.training.config import TrainingConfig
    from lenvm.training.trainer import leave_group, train

    train(TrainingConfig.parse(json.loads(Path(sys.argv[1]).read_text())))
    leave_group()
