"""A run that is killed again and again ends as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from gearshift.train.recipe_file import write_recipe
from gearshift.train.run import train
from tests.train.tools import losses, rows, same_weights

STAGES = [
    {"stage": "align", "steps": 6, "batch_size": 1, "sequence_length": 16},
    {"stage": "distill", "steps": 12, "batch_size": 1, "micro_batches": 2, "sequence_length": 16},
    {
        "stage": "distill",
        "steps": 8,
        "batch_size": 1,
        "sequence_length": 32,
        "sampling": {"uniform": 1.0, "presets": {"gdn*3": 1.0}},
        "losses": {"reverse_kl": 1.0},
    },
]
KILLS = 20

# Everything is imported once; then children of this process are killed at random moments of their lives:
# while they load, take steps, or write. When a run has ended, another one begins.
KILL = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from gearshift.train.recipe_file import load_recipe
from gearshift.train.run import train
recipe, kills, rng = load_recipe(Path(sys.argv[1])), int(sys.argv[2]), random.Random(sys.argv[3])

def start(number):
    pid = os.fork()
    if pid:
        return pid
    train(recipe.model_copy(update={"out": recipe.out / str(number)}), resume=True, progress=False)
    os._exit(0)

killed, number, limit, statuses = 0, 0, float(sys.argv[4]), []
while killed < kills:
    pid = start(number)
    time.sleep(rng.uniform(0.0, limit))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        killed += 1
    else:
        statuses.append(status)
        number += 1
statuses.append(os.waitpid(start(number), 0)[1])
print(json.dumps({"killed": killed, "statuses": statuses}))
"""


def test_twenty_kills_change_nothing(make_recipe, tmp_path):
    torch.set_num_threads(1)
    recipe = make_recipe(stages=STAGES, save_every=1)
    reference = make_recipe(stages=STAGES, save_every=1, out=tmp_path / "reference")
    train(reference, progress=False)
    seconds = sum(row["seconds"] for row in rows(reference.out))
    write_recipe(recipe, tmp_path / "recipe.yaml")
    # Long enough that steps are done between two kills, too short for all of them at once.
    arguments = [str(tmp_path / "recipe.yaml"), str(KILLS), "5", str(0.6 + seconds / 3)]
    done = subprocess.run(
        [sys.executable, "-c", KILL, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert not any(told["statuses"]), done.stderr
    assert told["killed"] == KILLS
    for number in range(len(told["statuses"])):
        assert losses(recipe.out / str(number)) == losses(reference.out)
        assert same_weights(recipe.out / str(number), reference.out)
