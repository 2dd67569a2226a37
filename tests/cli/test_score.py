"""`score` on files of every shape, and the normalisation of a reward model through the real command line."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_scorer, load_tokenizer

# Score heads of every kind: of a whole model, and of an adapter on 4-bit weights.
KINDS = {"full": {}, "4-bit": {"lora": {"rank": 4}, "quantization": {"type": "nf4"}}}
PAIRS = [{"prompt": f"add {i} and 1", "chosen": f"it is {i + 1}", "rejected": f"no, {i}"} for i in range(12)]


def write(rows: list[Any], name: str) -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def last_numbers(run: Path) -> dict[str, float]:
    with (run / "metrics.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: float(value) for name, value in last.items() if value and name.startswith("val/")}


@pytest.fixture
def trained(run: Callable, place: Path) -> Callable:
    """A reward model of a step or two in ``runs/<name>``, from ``reward.yaml`` with changes."""

    def fit(name: str = "rm", *argv: str, **base: Any) -> Path:
        config = yaml.safe_load(Path("reward.yaml").read_text())
        config["model"]["init_args"] |= {"base": {"name": "tiny", **base}, "learning_rate": 3e-2}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
        answer = run("fit", "--config", f"{name}.yaml", f"--name={name}", "--preflight=false", *argv)
        assert answer.status == 0, answer.err
        return Path("runs", name, "version_0")

    return fit


def complaint(answer: Any) -> str:
    assert answer.status == 2
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in answer.err
    return line


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_the_exported_models_scores(trained: Callable, run: Callable) -> None:
    """And predictions those of `score`, from either."""
    folder = trained("rm", "--model.unit_variance=true")
    constant = json.loads((folder / "hf" / "reward.json").read_text())["bias"]
    assert abs(constant) > 0.01
    data = ["--config", "rm.yaml", "--model.unit_variance=true", "--data.predict.path=pairs.jsonl"]
    for name, argv in {
        "ckpt": [f"--ckpt_path={folder}/checkpoints/last.ckpt"],
        "hf": [f"--model.base.name={folder}"],
    }.items():
        for command in ("validate", "predict"):
            answer = run(command, *data, f"--name={command}_{name}", *argv)
            assert answer.status == 0, answer.err
    numbers = [last_numbers(Path("runs", f"validate_{name}", "version_0")) for name in ("ckpt", "hf")]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert numbers[0]["val/score_chosen"] == pytest.approx(0, abs=1e-4)
    assert numbers[0]["val/score_std"] == pytest.approx(1, abs=1e-4)
    answer = run("score", folder, "pairs.jsonl", "--to", "out.jsonl")
    assert answer.status == 0, answer.err
    own = lines("out.jsonl")
    for name in ("ckpt", "hf"):
        predicted = lines(Path("runs", f"predict_{name}", "version_0", "predictions.jsonl"))
        for side in ("score_chosen", "score_rejected"):
            assert [row[side] for row in predicted] == pytest.approx([row[side] for row in own], abs=1e-5)


def test_a_run_that_goes_on_is_the_uninterrupted_one(trained: Callable, run: Callable) -> None:
    """Its last checkpoint holds the head that was trained, not the one that was made of it afterwards."""
    options = ["--model.unit_variance=true", "--model.schedule.name=constant"]
    whole = trained("whole", *options, "--trainer.max_epochs=2")
    part = trained("part", *options, "--trainer.max_epochs=1")
    checkpoint = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["normalisation"]) == {"scale", "bias"}
    before = json.loads((part / "hf" / "reward.json").read_text())
    again = ["--config", "part.yaml", *options, "--preflight=false", "--name=part", "--ckpt_path=last"]
    assert run("fit", *again, "--trainer.max_epochs=1").status == 0  # nothing is left to train
    assert json.loads((part / "hf" / "reward.json").read_text()) == before
    assert run("fit", *again, "--trainer.max_epochs=2").status == 0
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, part)]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    assert states[0]["normalisation"] == states[1]["normalisation"]


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind: str, trained: Callable, run: Callable) -> None:
    """Rows keep their order, number and fields; an answer scores the same in a pair, in a list and alone, in batches of
    one row and of all, and as plain transformers computes it."""
    folder = trained("rm", **KINDS[kind])
    write(PAIRS, "p.jsonl")
    write([{"prompt": row["prompt"], "completion": row["chosen"], "id": i} for i, row in enumerate(PAIRS)], "one.jsonl")
    turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}] for r in PAIRS]
    write([{"messages": messages} for messages in turns], "chat.jsonl")
    write(
        [{"prompt": r["prompt"], "answers": [r["rejected"], r["chosen"]], "scores": [1, 3]} for r in PAIRS], "l.jsonl"
    )
    found = {}
    for file in ("p", "one", "chat", "l"):
        for budget in (1, 100000):
            answer = run("score", folder, f"{file}.jsonl", "--to", "out.jsonl", f"--micro_batch_tokens={budget}")
            assert answer.status == 0, answer.err
            found[file, budget] = lines("out.jsonl")
        assert [row["row"] for row in found[file, 1]] == list(range(12))
    chosen = [row["score_chosen"] for row in found["p", 1]]
    assert len({round(value, 3) for value in chosen}) > 5
    assert [row["score"] for row in found["one", 1]] == pytest.approx(chosen, abs=1e-5)
    assert [row["id"] for row in found["one", 1]] == list(range(12))
    assert [row["score"] for row in found["chat", 1]] == pytest.approx(chosen, abs=1e-5)
    assert [row["scores"][1] for row in found["l", 1]] == pytest.approx(chosen, abs=1e-5)
    assert found["l", 1][3]["file_scores"] == [1, 3]
    for name in ("score_chosen", "score_rejected"):
        small, large = ([row[name] for row in found["p", budget]] for budget in (1, 100000))
        assert small == pytest.approx(large, abs=1e-5)

    base = Base(name=str(folder))
    model, tokenizer = load_scorer(base, trained=True, frozen=True), load_tokenizer(base)
    text = tokenizer.apply_chat_template(turns[4], tokenize=False)
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert tokens[0, -1] == tokenizer.eos_token_id
    constant = json.loads((folder / "hf" / "reward.json").read_text())["bias"]
    with torch.no_grad():
        inner = model.get_base_model() if kind == "4-bit" else model
        inner.config.pad_token_id = tokenizer.convert_tokens_to_ids("!")
        assert chosen[4] == pytest.approx(float(model(tokens).logits) + constant, abs=1e-5)

    rejected = [row["score_rejected"] for row in found["p", 1]]
    values = torch.tensor(chosen + rejected, dtype=torch.float64)
    won = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    said = run("score", folder, "p.jsonl").out
    assert f"mean {float(values.mean()):.4g}, standard deviation {float(values.std(correction=0)):.4g}" in said
    assert f"accuracy {won / 12:.4f} on 12 pairs, correlation with length " in said
    assert said.endswith("; written to p.scores.jsonl\n")
    assert f"accuracy {won / 12:.4f} on 12 pairs" in run("score", folder, "l.jsonl", "--to", "out.jsonl").out


def test_rows_that_cannot_be_scored(trained: Callable, run: Callable) -> None:
    folder = trained()
    write([PAIRS[0], {"prompt": "add 1", "chosen": " ", "rejected": "b"}, 7, PAIRS[1]], "bad.jsonl")
    answer = run("score", folder, "bad.jsonl", "--to=-")
    assert answer.status == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("reason") for row in rows] == [None, "empty chosen", "malformed", None]
    assert [row["score_chosen"] is None for row in rows] == [False, True, True, False]
    assert "2 of 4 rows used; skipped 1 empty chosen (row 1), 1 malformed (row 2)" in answer.err
    assert run("score", folder, "bad.jsonl", "--to=out.jsonl", "--on_bad_row=skip").status == 0
    assert [row["row"] for row in lines("out.jsonl")] == [0, 3]
    assert "bad.jsonl, row 1: empty chosen" in complaint(run("score", folder, "bad.jsonl", "--on_bad_row=error"))
    assert run("score", folder, "bad.jsonl", "--to=out.jsonl", "--limit=1").status == 0
    assert len(lines("out.jsonl")) == 1
    long = [{**PAIRS[0], "prompt": "so " * 200}, {**PAIRS[0], "chosen": "so " * 200}]
    write(long, "long.jsonl")
    assert run("score", folder, "long.jsonl", "--to=out.jsonl").status == 0
    assert [row.get("reason") for row in lines("out.jsonl")] == [None, "over-long"], "the prompt is cut, no answer is"


def test_what_cannot_be_scored_ends_in_one_line(trained: Callable, run: Callable, place: Path) -> None:
    folder = trained()
    write(PAIRS, "p.jsonl")
    write([{"prompt": "add 1 and 1"}], "prompts.jsonl")
    assert "tiny is no reward model" in complaint(run("score", "tiny", "p.jsonl"))
    from transformers import LlamaForSequenceClassification

    two = LlamaForSequenceClassification.from_pretrained("tiny", num_labels=2)
    two.save_pretrained("two")
    load_tokenizer(Base(name="tiny")).save_pretrained("two")
    said = complaint(run("score", "two", "p.jsonl"))
    assert "'two' holds weights of other shapes than LlamaForSequenceClassification: score.weight of [2, 16]" in said
    assert "no known shape with answers" in complaint(run("score", folder, "prompts.jsonl"))
    assert "is the file that is to be scored" in complaint(run("score", folder, "p.jsonl", "--to=p.jsonl"))
    assert "--limit must be at least 1, not 0" in complaint(run("score", folder, "p.jsonl", "--limit=0"))
    assert "is a folder" in complaint(run("score", folder, "p.jsonl", "--to=tiny"))
    assert "cannot be written" in complaint(run("score", folder, "p.jsonl", "--to=p.jsonl/out.jsonl"))
    Path("out.jsonl").write_text("what was there\n")
    weights = folder / "hf" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    state["model.embed_tokens.weight"][load_tokenizer(Base(name=str(folder))).convert_tokens_to_ids("7")] = math.nan
    save_file(state, weights, metadata={"format": "pt"})
    line = complaint(run("score", folder, "p.jsonl", "--to=out.jsonl"))
    assert "p.jsonl, row 6: the model's score is nan, no finite number" in line  # "it is 7"
    assert Path("out.jsonl").read_text() == "what was there\n"
    assert not list(place.glob("*.partial"))


# --- ranked lists ----------------------------------------------------------------------------------------------------


def test_ranked_lists_through_the_command_line(run: Callable, place: Path) -> None:
    """With preflight and validation; and a policy's loss on them ends in one line that says what reads them."""
    rows = [
        {"instruction": f"add {i} and 1", "completions": [
            {"response": f"no, {i}", "overall_score": 1.0}, {"response": f"it is {i + 1}", "overall_score": 9.0},
            {"response": f"it is {i + 1}, i think", "overall_score": 6.5}]}
        for i in range(8)
    ]  # fmt: skip
    write(rows, "lists.jsonl")
    lists = ["--data=RankingDataModule", "--data.train.path=lists.jsonl", "--data.validation.path=lists.jsonl"]
    answer = run("fit", "--config=reward.yaml", *lists, "--data.cache=null", "--data.batch_size=4")
    assert answer.status == 0, answer.err
    assert "train: 8 lists of 24 answers, 24 ranked pairs" in answer.err
    assert "ok  padding" in answer.out
    numbers = last_numbers(Path("runs/rewardmodel/version_0"))
    assert {"val/accuracy", "val/calibration_error", "val/length_correlation", "val/score_std"} <= numbers.keys()
    answer = run(
        "predict", "--config=reward.yaml", *lists, "--data.cache=null", "--ckpt_path=last", "--name=rewardmodel"
    )
    assert answer.status == 0, answer.err
    line = complaint(run("fit", "--config=dpo.yaml", "--data.train.path=lists.jsonl"))
    assert "are ranked lists of answers, which RankingDataModule reads for a RewardModel" in line
    line = complaint(run("fit", "--config=dpo.yaml", *lists, "--data.cache=null"))
    assert "RankingDataModule gives ranked lists of answers, and DPO learns from preference pairs (Pref" in line
    assert "max_answers must be at least 2" in complaint(
        run("fit", "--config=reward.yaml", *lists, "--data.max_answers=1")
    )
    answer = run("memory", "--config=reward.yaml", *lists, "--data.max_length=32")
    assert answer.status == 0, answer.err
