"""``sweep``: a W&B sweep file without W&B: the same arms, the same argument lines, a process for each.

``space`` says which values the arms have, ``file`` reads the file and builds an arm's command (with wandb's own
builder), ``check`` compares what commands resolve to (``commands.sweep_arms`` sends each through the real parser before
anything starts), ``records`` keeps the sweep's folder, ``processes`` starts and ends arms, ``runner`` sees to it that
all of them are run.

    runs/sweeps/<name>/
      sweep.yaml, sweep.json        the file as it was, and how it was called
      <arm>/arm.json                its parameters, status, run folder, times, exit status: ``records.Arm``
      <arm>/config.json             the configuration it resolved to before it was started
      <arm>/log.txt                 what it printed
      <arm>/version_<n>/            its run folder, as of any other run
"""
