"""``evaluate`` on files and models as a user has them, and the callback of the loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_folders import assert_equal, final, metrics, timeless

from rlhf_lit.algorithms import RewardModel
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.models.saving import save_hf

FUNCTION = ["--judge=RewardFromFunction", "--judge.function=test_evaluate_command.letters"]
PROMPTS = ["--prompts.path=sft.jsonl", "--prompts.limit=9", "--sampling.max_new_tokens=6"]


def letters(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A score that differs from response to response, and ties now and then."""
    return [float(sum(map(ord, response)) % 5) for response in responses]


def broken(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward function with a hole."""
    return [float("nan")] * len(responses)


@pytest.fixture(scope="module")
def models(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is not `tiny` (its weights moved a little), and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    base = Base(name=str(materials / "tiny"))
    other: Any = load_causal_lm(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    other.save_pretrained(folder / "other")
    load_tokenizer(base).save_pretrained(folder / "other")
    reward = RewardModel(base)
    reward.configure_model()
    save_hf(reward, folder / "reward")
    return folder


@pytest.fixture
def here(place: Path, models: Path) -> Path:
    """The working folder with the materials and both models."""
    for name in ("other", "reward"):
        shutil.copytree(models / name, place / name)
    return place


def found(folder: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(folder, "evaluation.json").read_text())
    return result


# --- on its own ------------------------------------------------------------------------------------------------------


def test_everything_at_once(run: Callable, here: Path) -> None:
    options = {
        "baseline": "tiny", "reference": "tiny", "samples": 3, "best_of": [1, 2, 3],
        "judge": {"class_path": "RewardFromModel", "init_args": {"path": "reward"}},
        "gold": {"class_path": "RewardFromFunction", "init_args": {"function": "test_evaluate_command.letters"}},
        "prompts": {"path": "sft.jsonl", "limit": 9}, "pairs": {"path": "pairs.jsonl"},
        "sampling": {"max_new_tokens": 6},
    }  # fmt: skip
    Path("all.yaml").write_text(yaml.safe_dump({**options, "model": "tiny"}))
    answer = run("evaluate", "other", "--config=all.yaml", "--wandb.offline=true")
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-1] == "runs/evaluate/version_0/evaluation.json"
    assert "prompts: sft.jsonl: 9 of 9 rows used" in answer.err
    assert "pairs: pairs.jsonl: 32 of 32 rows used" in answer.err
    folder = here / "runs/evaluate/version_0"
    result = found(folder)
    assert result["model"] == str(here / "other"), "what is typed first goes over the config"
    assert result["judges"] == {"judge": str(here / "reward"), "gold": "test_evaluate_command.letters"}
    assert result["settings"]["seed"] == 0
    assert result["environment"]["packages"]["torch"]
    for judge in ("judge", "gold"):
        rate = result["win_rates"][judge]
        assert rate["win"]["mean"] + rate["tie"]["mean"] + rate["loss"]["mean"] == pytest.approx(1)
        assert rate["win_rate"]["low"] < rate["win_rate"]["mean"] < rate["win_rate"]["high"]
    curve = result["best_of_n"]
    assert [point["n"] for point in curve] == [1, 2, 3]
    assert curve[0]["proxy"]["mean"] == pytest.approx(result["responses"]["model"]["scores"]["judge"]["mean"])
    assert curve[0]["proxy"]["mean"] < curve[1]["proxy"]["mean"] < curve[2]["proxy"]["mean"]
    assert result["kl"]["exact"]["mean"] > 0
    assert result["pairs"]["overall"]["count"] == 32
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 27
    golds = letters([], [line["model"] for line in lines], [])
    assert [line["model/gold"] for line in lines] == golds
    assert sum(golds) / 27 == pytest.approx(result["responses"]["model"]["scores"]["gold"]["mean"])
    assert (folder / "evaluation.png").stat().st_size > 0
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_the_batch_changes_nothing(run: Callable, here: Path) -> None:
    command = ["evaluate", "other", "--baseline=tiny", "--reference=tiny", *FUNCTION, *PROMPTS, "--samples=2"]
    assert run(*command, "--to=once").status == 0
    assert run(*command, "--to=cut", "--sampling.rows_at_once=2", "--micro_batch_tokens=40").status == 0
    assert run(*command, "--to=seed", "--seed=1").status == 0
    assert Path("once/samples.jsonl").read_text() == Path("cut/samples.jsonl").read_text()
    assert Path("once/samples.jsonl").read_text() != Path("seed/samples.jsonl").read_text()
    once, cut = found("once"), found("cut")
    assert once["win_rates"] == cut["win_rates"]
    for name in ("exact", "k1"):
        assert once["kl"][name]["mean"] == pytest.approx(cut["kl"][name]["mean"], abs=1e-5)
        assert once["kl"][name]["low"] == pytest.approx(cut["kl"][name]["low"], abs=1e-5)


def test_a_model_ties_with_its_own_responses_and_has_no_kl_to_itself(run: Callable, here: Path) -> None:
    """The responses of the first evaluation are the second one's baseline."""
    assert run("evaluate", "tiny", *PROMPTS, "--to=first").status == 0
    rows = [json.loads(line) for line in Path("first/samples.jsonl").read_text().splitlines()]
    Path("own.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "response": row["model"] or "?"}) + "\n" for row in rows)
    )
    answer = run("evaluate", "tiny", "--baseline=own.jsonl", "--reference=tiny", *FUNCTION, *PROMPTS, "--to=second")
    assert answer.status == 0, answer.err
    result = found("second")
    assert result["win_rates"]["judge"]["tie"]["mean"] == 1
    assert result["win_rates"]["judge"]["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert result["kl"]["exact"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "baseline: own.jsonl: 9 of 9 rows used" in answer.err
    assert run("evaluate", "tiny", "--baseline=tiny", *FUNCTION, *PROMPTS, "--to=third").status == 0
    assert found("third")["win_rates"]["judge"]["tie"]["mean"] < 1, "a baseline draws noise of its own"


def test_a_reward_model_on_pairs_is_as_good_as_validate_says(run: Callable, here: Path) -> None:
    rows = [{"prompt": "a?", "chosen": "b", "rejected": "c"}, {"prompt": "a?", "chosen": "", "rejected": "c"}]
    assert run("evaluate", "reward", "--pairs.path=pairs.jsonl", "--to=rm").status == 0
    ours = found("rm")["pairs"]["overall"]
    assert run("validate", "--config=reward.yaml", "--model.base.name=reward").status == 0
    theirs = float(metrics(here / "runs/rewardmodel/version_0")[-1]["val/accuracy"])
    assert ours["accuracy"]["mean"] == pytest.approx(theirs, abs=1e-6)
    Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = run("evaluate", "reward", "--pairs.path=bad.jsonl", "--to=bad")
    assert answer.status == 0
    assert "pairs: bad.jsonl: 1 of 2 rows used; skipped 1 empty chosen (row 1)" in answer.err


REFUSED: list[tuple[list[str], str]] = [
    (["tiny"], "nothing to evaluate on: name prompts to answer (--prompts.path=FILE), or --pairs.path=FILE"),
    (["nowhere/at/all", *PROMPTS], "nowhere/at/all: no such model folder"),
    (["tiny", *PROMPTS, "--baseline=tiny"], "baseline: name a judge"),
    (["tiny", *PROMPTS, "--best_of=[1]"], "best_of: name the judge that chooses"),
    (["tiny", *PROMPTS, *FUNCTION, "--samples=2", "--best_of=[1,4]"], "best_of: 4 is more than the 2 samples"),
    (["tiny", *PROMPTS, "--samples=0"], "samples must be at least 1, not 0"),
    (["tiny", *PROMPTS, "--sampling.temperature=0"], "sampling.temperature must be greater than 0, not 0.0"),
    (["tiny", *PROMPTS, "--judge=RegexReward", "--judge.pattern=("], "reward.pattern: '(' is no regular expression"),
    (["tiny", *PROMPTS, "--judge=Nobody"], "judge: there is no class named 'Nobody'"),
    (["tiny", *PROMPTS, "--judge=RewardFromModel", "--judge.path=tiny"], "tiny is no reward model"),
    (["tiny", *PROMPTS, "--judge=RewardFromFunction", "--judge.function=test_evaluate_command.broken"],
     "judge.function: broken returned nan instead of a number"),
    (["tiny", "--prompts.path=none.jsonl"], "no such file: none.jsonl"),
    (["tiny", "--prompts.path=empty.jsonl"], "empty.jsonl has no rows"),
    (["tiny", *PROMPTS, *FUNCTION, "--baseline=short.jsonl"],
     "baseline: short.jsonl has no response to 8 of the 9 prompts; the first is 'add 1 and 1'"),
    (["tiny", *PROMPTS, "--sampling.max_new_tokens=256"], "sampling.max_new_tokens: 256 new tokens leave no prompt of"),
    (["tiny", *PROMPTS, "--reference=tiny", "--sampling.top_k=3"], "sampling.top_k, sampling.top_p: KL is that of"),
    (["reward", *PROMPTS], "reward is a reward model and writes no responses"),
    (["tiny", *PROMPTS, "--pairs.path=pairs.jsonl"], "pairs: a policy judges pairs by its log-ratio to a reference"),
    (["tiny", "--pairs.path=pairs.jsonl"], "pairs: tiny is no reward model; name --reference"),
    (["tiny", "--pairs.path=pairs.jsonl", *FUNCTION], "judge: it speaks of responses, and there are no prompts"),
    (["tiny", "--pairs.path=sft.jsonl", "--reference=other"], "have no known shape of preference pairs"),
    (["tiny", *PROMPTS, "--to=reward"], "--to reward: it is there, with something in it"),
    (["tiny", *PROMPTS, "--sample=3"], "sample: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "complaint"), REFUSED, ids=[" ".join(argv)[-60:] for argv, _ in REFUSED])
def test_bad_input_is_one_line(run: Callable, here: Path, argv: list[str], complaint: str) -> None:
    Path("empty.jsonl").write_text("")
    Path("short.jsonl").write_text(json.dumps({"prompt": "add 0 and 1", "response": "1"}) + "\n")
    before = {path for path in here.rglob("*") if path.is_dir()}
    answer = run("evaluate", *argv)
    assert answer.status == 2
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert "Traceback" not in answer.err
    assert {path for path in here.rglob("*") if path.is_dir()} == before, "nothing is written"


# --- in the loop -----------------------------------------------------------------------------------------------------

LOOP = [
    "--trainer.callbacks+=rlhf_lit.evaluation.WinRate", "--trainer.callbacks.judge=RewardFromFunction",
    "--trainer.callbacks.judge.function=test_evaluate_command.letters", "--trainer.callbacks.prompts=8",
]  # fmt: skip
OURS = {
    "val/win_rate", "val/win_rate_error", "val/tie_rate", "val/judge_score", "val/judge_score_baseline",
    "val/response_length", "val/response_length_baseline", "val/kl_to_reference",
}  # fmt: skip


def test_it_logs_and_leaves_the_run_as_it_was(run: Callable, here: Path) -> None:
    """The same weights to the bit and the same metrics with it as without, its own beside them."""
    options = ["--config=ppo.yaml", "--trainer.max_epochs=2", "--model.base.lora.rank=2", "--data.train.limit=8"]
    options += ["--data.validation.path=sft.jsonl", "--data.validation.limit=8"]
    with_it = run("fit", *options, *LOOP, "--name=with")
    assert with_it.status == 0, with_it.err
    assert run("fit", *options, "--name=without").status == 0
    folders = [here / "runs" / kind / "version_0" for kind in ("with", "without")]
    assert_equal(*(final(folder)["state_dict"] for folder in folders))
    ours, plain = (metrics(folder) for folder in folders)
    assert set(ours[0]) - set(plain[0]) == OURS
    for row, other in zip(ours, plain, strict=True):
        assert {k: v for k, v in timeless(row).items() if k not in OURS} == timeless(other)
    validated = [row for row in ours if row["val/win_rate"]]
    assert len(validated) == 2
    for row in validated:
        assert 0 <= float(row["val/win_rate"]) <= 1
        assert float(row["val/tie_rate"]) / 2 <= float(row["val/win_rate"])
    assert validated[0]["val/judge_score_baseline"] == validated[1]["val/judge_score_baseline"]


def test_a_run_that_goes_on_knows_what_it_began_as(run: Callable, here: Path) -> None:
    options = ["--config=sft.yaml", *LOOP, "--model.learning_rate=0.05", "--model.schedule.name=constant"]
    assert run("fit", *options, "--name=whole").status == 0
    stopping = ["--trainer.callbacks+=test_command_line.StopAt", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError, match="the power went out"):
        run("fit", *options, *stopping, "--name=halves", "--checkpoint.every_n_train_steps=3")
    answer = run("fit", *options, "--name=halves", "--ckpt_path=last")
    assert answer.status == 0, answer.err
    whole, halves = (
        [
            {key: row.get(key) for key in OURS}
            for row in metrics(here / "runs" / name / "version_0")
            if row["val/win_rate"]
        ]
        for name in ("whole", "halves")
    )
    assert len(whole) == 2
    assert whole == halves
    assert whole[0] != whole[1], "the policy has moved"
    assert whole[0]["val/kl_to_reference"] is None, "SFT has no reference"


@pytest.mark.parametrize(
    ("name", "extra", "complaint"),
    [
        ("reward", [], "WinRate: RewardModel writes no responses"),
        ("ppo", [], "WinRate: it needs held-out prompts"),
        ("sft", ["--trainer.callbacks.judge=RewardFromModel", "--trainer.callbacks.judge.path=tiny"],
         "tiny is no reward model"),
        ("sft", ["--trainer.callbacks.prompts=0"], "WinRate: prompts must be at least 1, not 0"),
        ("sft", ["--trainer.callbacks.baseline=pairs.jsonl", "--data.validation.path=short.jsonl"],
         "baseline: pairs.jsonl has no response to 1 of the 1 prompts"),
    ],
)  # fmt: skip
def test_a_callback_that_does_not_fit_is_one_line(
    run: Callable, here: Path, name: str, extra: list[str], complaint: str
) -> None:
    Path("short.jsonl").write_text(json.dumps({"prompt": "another", "completion": "1"}) + "\n")
    answer = run("fit", f"--config={name}.yaml", *LOOP, *extra)
    assert answer.status == 2
    assert complaint in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
