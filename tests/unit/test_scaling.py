"""The scaling benchmark: fits and points by hand, the size of a model against transformers', and one turn as typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not part of the installed package

from experiments.benchmarks.scaling.__main__ import main
from experiments.benchmarks.scaling.axes import NOTHING, points
from experiments.benchmarks.scaling.table import Costs, Side, exponent, foreseen, table
from experiments.benchmarks.throughput.ours import RandomDemonstrations, RandomPairs, data_module
from experiments.benchmarks.throughput.workload import SHAPES, Measured, Workload, random_rows

ROOT = Path(__file__).parents[2]
COMMON = Workload(task="sft", folder="runs", pairs="pairs.jsonl", shape="128-352-2-2-2", row_tokens=128, batch_size=8)


def test_the_exponent_of_a_power_is_that_power() -> None:
    sizes = [64.0, 128.0, 1024.0]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5, abs=1e-12)
    assert exponent(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0, abs=1e-12)


def test_the_exponent_is_of_least_squares_on_logarithms() -> None:
    """log2 of the costs 0, 0 and 3 at 0, 1 and 2: slope 3/2, where the ends alone would say the same; with 0, 3 and 3
    at 0, 1 and 3: x̄ = 4/3, Σ(x−x̄)² = 14/3, Σ(x−x̄)y = −1 + 5 = 4, slope 6/7."""
    assert exponent([1, 2, 4], [1, 1, 8]) == pytest.approx(1.5, abs=1e-12)
    assert exponent([1, 2, 8], [1, 8, 8]) == pytest.approx(6 / 7, abs=1e-12)


def test_costs_at_or_below_the_base_are_left_out_of_a_fit() -> None:
    assert exponent([1, 2, 4, 8], [0, -5, 1, 2]) == pytest.approx(1, abs=1e-12)
    assert exponent([1, 2], [0, 4]) is None


def test_what_is_foreseen_follows_the_growth_and_is_at_least_in_proportion() -> None:
    assert foreseen([1, 2, 4], [9, 1, 4], 8) == pytest.approx(16)  # squared between the last two
    assert foreseen([2, 4], [5, 5], 12) == pytest.approx(15)
    assert foreseen([4], [5], 12) == pytest.approx(15)


@pytest.mark.parametrize("shape", ["2m", "7m", "18m", "50m", "64-176-2-4-2-1000"])
def test_a_model_has_the_weights_that_are_counted(shape: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    workload = Workload(task="sft", folder="", pairs="", shape=shape)
    hidden, intermediate, layers, heads, kv_heads, vocabulary = workload.dimensions
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        assert workload.weights == sum(weight.numel() for weight in LlamaForCausalLM(config).parameters())


def test_points_say_what_is_varied_and_come_in_order() -> None:
    long, short = reversed(points("length", ["1024", "64"], COMMON))
    assert (short.workload.row_tokens, long.workload.row_tokens, long.workload.max_length) == (64, 1024, 1024)
    assert [one.workload.batch_size for one in points("batch", ["2", "32"], COMMON)] == [2, 32]
    (one,) = points("vocabulary", ["32768"], COMMON)
    assert one.workload.dimensions == (128, 352, 2, 2, 2, 32768)
    (one,) = points("logits", ["4x256x16384"], COMMON)
    assert (one.size, one.workload.batch_size, one.workload.row_tokens) == (2**24, 4, 256)
    small, large = points("size", ["7m", "2m"], COMMON)
    assert (small.workload.dimensions, large.size) == (SHAPES["2m"], large.workload.weights)
    assert large.state == 16 * large.workload.weights


@pytest.mark.parametrize(
    ("axis", "text"), [("length", "0"), ("batch", "many"), ("size", "9b"), ("logits", "4x128"), ("vocabulary", "1x2")]
)
def test_a_point_that_is_none_is_named(axis, text) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        points(axis, [text], COMMON)


@pytest.mark.parametrize("length", [16, 17])
def test_rows_have_their_exact_length_half_of_it_the_response(length: int) -> None:
    workload = Workload("sft", "", "", shape="2m", row_tokens=length, batch_size=2, steps=2, warm_up=1)
    data = data_module(workload)
    assert isinstance(data, RandomDemonstrations)
    data._load("train")
    assert len(data.examples["train"]) == 6
    for row in data.examples["train"]:
        assert len(row["tokens"]) == len(row["mask"]) == length
        assert sum(row["mask"]) == 8 == sum(row["mask"][-8:])


def test_pairs_share_their_prompt_alone() -> None:
    workload = Workload("dpo", "", "", shape="2m", row_tokens=16, batch_size=2, steps=1, warm_up=1)
    data = data_module(workload)
    assert isinstance(data, RandomPairs)
    data._load("train")
    for row, drawn in zip(data.examples["train"], random_rows(workload), strict=True):
        assert row["chosen"] == drawn[:16]
        assert row["rejected"] == drawn[:8] + drawn[16:]
        assert len(row["rejected"]) == 16
        assert min(drawn) >= 3


def test_the_table_has_medians_what_is_above_the_base_and_why_a_point_is_missing() -> None:
    """Ours: 2 and 4 s, 3 GB above the base at both. The peer: 8 s; then not run."""
    found = points("batch", ["2", "4"], Workload(**vars(COMMON) | {"shape": "2m", "steps": 2}))
    ours = [Costs([Measured(s, 1, [], 4 * 10**9) for s in seconds]) for seconds in ((2, 4, 30), (8, 8, 8))]
    peer = [Costs([Measured(8, 1, [], 8 * 10**9)] * 3), Costs(why_not="not run: too large")]
    lines = table("rows", found, [Side("ours", 10**9, ours), Side("trl", 2 * 10**9, peer)]).splitlines()
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines)}
    state = found[0].state / 1e9
    assert rows["2"] == [
        "2", "4", "2.00 (0.27–4.00)", "4.000", "8.000", "0.50", f"{state:.3f}", f"{3 - state:.3f}", f"{6 - state:.3f}",
    ]  # fmt: skip
    assert rows["4"][:6] == ["4", "not run: too large", "–", "4.000", "–", "–"]
    assert rows["libraries (base)"][3:5] == ["1.000", "2.000"]
    assert rows["exponent, all"] == ["1.00", "–", "–", "0.00", "–", "–", "0.00", "0.00", "–"]


def test_one_turn_as_it_is_typed(tmp_path, monkeypatch, capsys) -> None:
    """Two lengths of the smallest model there is, ours alone; the file trains the tokenizer. The points are measured in
    processes of their own."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}\n')
    words = ["--axis=length", "--points", "8", "32", f"--shape={NOTHING['shape']}", "--peer=none", "--turns=1"]
    words += ["--steps=1", "--batch-size=1", f"--data={file}", f"--folder={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["scaling", *words])
    monkeypatch.chdir(ROOT)
    main()
    said = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["8", "32", "libraries (base)", "exponent, all", "exponent, last two"]
    for row in rows[2:4]:
        assert float(row[1]) > 0
        assert float(row[2]) > 0.1  # GB, of which the libraries take most


def test_what_the_axis_varies_is_not_set_twice() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.scaling", "--axis=batch", "--batch-size=4"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--batch-size is what --axis batch varies: set it by --points")
