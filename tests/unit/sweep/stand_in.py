"""What stands in for `rlhf-lit fit` where a sweep's arms are started, ended and counted, and need not train.

It takes the same arguments, leaves a run folder, and does what its `--do` says:
    finish      a checkpoint and a metric, and the end
    fail        a line of complaint, status 2
    recover     fails the first time
    hang        waits to be interrupted, with a process of its own beside it; after a checkpoint
    hang_early  the same before any checkpoint
    stubborn    hangs, whatever signal it is sent
Hung arms finish when they are started again. With `--together=N` an arm that is to finish waits until N have begun.
"""

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path


def main() -> int:
    options = dict(word[2:].split("=", 1) for word in sys.argv[2:] if "=" in word)
    arm = Path(options["runs"], options["name"])
    attempts = len(list(arm.glob("attempt_*")))
    (arm / f"attempt_{attempts}").write_text(" ".join(sys.argv[1:]))
    versions = sorted(arm.glob("version_*"))
    run = versions[-1] if options.get("ckpt_path") == "last" else arm / f"version_{len(versions)}"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    print("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"], "WANDB_MODE", os.environ["WANDB_MODE"], flush=True)
    what = options["do"]
    if what == "fail" or (what == "recover" and not attempts):
        print("Traceback (most recent call last):\nerror: no such file: pairs.jsonl\nbye", flush=True)
        return 2
    if what == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what != "hang_early":
        with zipfile.ZipFile(run / "checkpoints" / "last.ckpt", "w") as file:
            file.writestr("state", "")
        (run / "metrics.csv").write_text(f"step,val/accuracy\n0,0.1\n1,0.{options.get('seed_everything', 5)}\n2,\n")
    if what in ("hang", "hang_early", "stubborn") and not attempts:
        beside = subprocess.Popen(["sleep", "600"])
        (arm / "hanging").write_text(f"{os.getpid()} {beside.pid}")
        while True:
            time.sleep(0.05)
    began = time.time()
    (arm / "began").touch()
    while len(list(arm.parent.glob("*/began"))) < int(options.get("together", 1)) and time.time() < began + 60:
        time.sleep(0.01)
    time.sleep(float(options.get("seconds", 0)))
    (arm / "times").write_text(f"{began} {time.time()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
