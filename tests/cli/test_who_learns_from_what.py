"""An algorithm with rows of another kind ends in one line that names both, before a row is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

MODULES = {
    "SFTDataModule": "demonstrations",
    "PreferenceDataModule": "preference pairs",
    "RankingDataModule": "ranked lists of answers",
    "UnpairedDataModule": "answers judged one by one",
    "RolloutDataModule": "prompts to be answered",
}
TAKES = {
    "sft": ("SFT", {"SFTDataModule"}),
    "dpo": ("DPO", {"PreferenceDataModule"}),
    "reward": ("RewardModel", {"PreferenceDataModule", "RankingDataModule"}),
    "ppo": ("PPO", {"RolloutDataModule"}),
}


@pytest.mark.parametrize("config", TAKES)
def test_rows_of_another_kind(run, config: str) -> None:
    name, taken = TAKES[config]
    wanted = " or ".join(f"{MODULES[module]} ({module})" for module in sorted(taken))
    for module, words in MODULES.items():
        if module in taken:
            continue
        answer = run("fit", f"--config={config}.yaml", f"--data={module}")
        assert answer.status == 2
        *_, line = answer.err.splitlines()
        assert line == f"error: data: {module} gives {words}, and {name} learns from {wanted}"
        assert "rows used" not in answer.err


def test_kto_has_pairs_dealt_out_by_its_own_module(run) -> None:
    config = yaml.safe_load(Path("dpo.yaml").read_text())
    config["model"] |= {"class_path": "KTO"}
    answer = run("fit", "--config=dpo.yaml", "--model=KTO")
    assert answer.status == 2
    assert answer.err == ("error: model: DPOLoss does not fit: the fields of KTOLoss alone, without class_path\n")
    config["model"]["init_args"]["loss"] = {"beta": 0.1}
    Path("kto.yaml").write_text(yaml.safe_dump(config))
    kto = ("fit", "--config=kto.yaml")
    answer = run(*kto)
    assert answer.status == 2
    assert "PreferenceDataModule gives preference pairs, and KTO learns from answers judged one by one" in answer.err
    assert run(*kto, "--data=UnpairedDataModule").status == 0
