"""Make a task of srun one rank of torch's: srun python launch/slurm/rank.py SCRIPT argument ..."""

import os
import signal
import sys

# A signal that comes while the libraries are still being loaded waits until the run listens.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
for name, of_slurm in {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "NTASKS"}.items():
    os.environ[name] = os.environ[f"SLURM_{of_slurm}"]
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
