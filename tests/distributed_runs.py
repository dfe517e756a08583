"""What a process of ``test_distributed`` does: the runs of a plan, one after the other."""

import json
import sys
from pathlib import Path

import torch

from nlhf import config, distributed, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for values in json.loads(Path(sys.argv[1]).read_text()):
        train.run(config.from_dict(values, "plan"), resume=True)
    distributed.leave()
