"""``export`` after real runs: what it leaves loads in plain transformers and peft, and its card says what it may."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_folders import save_small_model
from torch import Tensor

from rlhf_lit.__main__ import main
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.runs import resolve_model

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FEW = {
    "trainer": {"max_steps": 2, "limit_val_batches": 1, "enable_progress_bar": False},
    "model": {"init_args": {"base": {"name": "model", "fresh": False}, "learning_rate": 0.01}},
    "data": {"init_args": {"cache": None, "batch_size": 8}},
}
WORLD = ["--data.train.world.demonstrations=64", "--data.train.world.prompts=16", "--data.train.world.held_out=8"]
RUNS: dict[str, tuple[str, list[str], list[str]]] = {
    "sft": ("sft", ["lora"], []),
    "sft4": ("sft", ["qlora"], []),
    "reward": ("reward", ["lora"], ["--data.train.path=pairs.jsonl", "--data.validation.path=pairs.jsonl"]),
    "ppo4": (
        "ppo",
        ["qlora"],
        [
            "--model.reward.path=runs/reward", "--model.reward.own_base=true", "--model.critic.init=policy",
            "--model.sampling.max_new_tokens=6", "--data.rollout_size=16", "--data.ppo_epochs=1", "--data.episodes=32",
        ],
    ),
}  # fmt: skip
EOS = 2
TOKENS = torch.tensor([[1, 20, 30, 40, 25, 33, EOS]])


def call(*argv: object) -> tuple[int, str, str]:
    """A command inside this process: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in argv])
    torch.set_grad_enabled(True)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and four finished runs on it."""
    folder = tmp_path_factory.mktemp("export")
    # bitsandbytes' own kernel for AVX512-BF16 takes whole blocks only: widths that are multiples of 64.
    save_small_model(folder / "model", hidden=64, intermediate=128)
    (folder / "few.yaml").write_text(yaml.safe_dump(FEW))
    pairs = [{"prompt": f"what is {i} plus 1?", "chosen": f"{i + 1}.", "rejected": "no."} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name, (algorithm, overlays, options) in RUNS.items():
            configs = [CONFIGS / algorithm / "quickstart.yaml", "few.yaml"]
            configs += [CONFIGS / "overlays" / f"{overlay}.yaml" for overlay in overlays]
            world = WORLD if algorithm != "reward" else []
            status, _, err = call("fit", *(f"--config={c}" for c in configs), *world, f"--name={name}", *options)
            assert status == 0, err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def exported(name: str, to: Path, *options: str) -> float:
    """Export a run; → the difference that is printed, in the command's one line."""
    status, out, err = call("export", f"runs/{name}", f"--to={to}", *options)
    assert (status, err) == (0, ""), err
    assert out.count("\n") == 1
    match = re.search(r"largest logit difference to the run's own model (\S+) \(its logits reach \S+\), on \d", out)
    assert match, out
    return float(match[1])


def outputs(model: Any) -> Tensor:
    """Logits, or scores; that of EOS, which the small model has twenty times larger, at the size of the others."""
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits.float()
    return found if found.shape[-1] == 1 else found / torch.where(torch.arange(found.shape[-1]) == EOS, 20.0, 1.0)


def in_run(name: str) -> Tensor:
    """The logits of the run's own model."""
    load: Callable[[Base], Any] = load_scorer if name == "reward" else load_causal_lm
    model = load(Base(name=f"runs/{name}"))
    unwrapped(model).config.pad_token_id = 0  # one row, without pads
    return outputs(model)


@pytest.mark.parametrize("name", RUNS)
def test_an_adapter_loads_in_plain_peft(here: Path, tmp_path: Path, name: str) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import BitsAndBytesConfig

    difference = exported(name, tmp_path / "out")
    assert difference < 1e-5
    auto = AutoPeftModelForSequenceClassification if name == "reward" else AutoPeftModelForCausalLM
    keywords: dict[str, Any] = {"num_labels": 1} if name == "reward" else {}
    if name.endswith("4"):
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head"],
        )
    model = auto.from_pretrained(tmp_path / "out", dtype=torch.float32, **keywords)
    unwrapped(model).config.pad_token_id = 0
    assert sum("lora_B" in key for key in model.state_dict()) == 14  # of one adapter: 7 layers in each of 2 blocks
    assert any(weight.any() for key, weight in model.state_dict().items() if "lora_B" in key)
    # The 4-bit kernels round to bfloat16, and peft's wrapper may choose another of them.
    torch.testing.assert_close(outputs(model), in_run(name), rtol=0, atol=0.05 if name.endswith("4") else 1e-5)
    assert not list((tmp_path / "out").glob("model*"))
    # By its absolute path, so that the adapter is found from any working folder.
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        here / "model"
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [("sft", []), ("sft4", []), ("sft4", ["--dequantize"]), ("reward", []), ("ppo4", ["--dequantize"])],
    ids=["sft", "sft4", "sft4 dequantised", "reward", "ppo4 dequantised"],
)
def test_a_merged_model_loads_in_plain_transformers(here: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    import transformers

    folder = tmp_path / "out"
    difference = exported(name, folder, "--merge", *options)
    scorer = name == "reward"
    auto = transformers.AutoModelForSequenceClassification if scorer else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto")
    off = float((outputs(model) - in_run(name)).abs().max())
    trained = Path(resolve_model(f"runs/{name}"))
    if name in ("sft", "reward"):
        assert max(off, difference) < 1e-5
    else:
        assert off < 3 * difference  # other tokens than those it was printed for
    if "--dequantize" in options and name == "sft4":
        assert difference < exported(name, tmp_path / "other", "--merge") / 3
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, trained))
    turns = [{"role": "user", "content": "what is 1 plus 2?"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    if scorer:
        assert (folder / "reward.json").read_text() == (trained / "reward.json").read_text()
        assert model.config.num_labels == 1
    else:
        base = transformers.GenerationConfig.from_pretrained(here / "model").to_diff_dict()
        del base["_from_model_config"]  # it has the tokenizer's special tokens now
        found = transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()
        assert {key: found.get(key) for key in base} == base


def test_the_card_holds_what_was_recorded_and_no_other_number(here: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    difference = exported("sft4", tmp_path / "out", "--merge", "--dequantize")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf_lit", "sft"]
    }  # fmt: skip
    text = card.text
    assert f"{difference:.3g}" in text
    assert "dequantised 4-bit base" in text
    assert f"base: `{here / 'model'}`" in text
    assert "type nf4, double True, compute_dtype bfloat16" in text
    run = here / "runs" / "sft4" / "version_0"
    block = re.search(r"```yaml\n(.*?)```", text, flags=re.S)
    assert block
    assert block[1] == (run / "config.yaml").read_text()
    with (run / "metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    table = dict(re.findall(r"^\| (val/\S+|train/\S+) \| (\S+) \|$", text, flags=re.M))
    assert table == {key: value for key, value in last.items() if key.startswith("val/") and value}
    assert f"validation at step {last['step']} " in text
    for package, number in json.loads((run / "versions.json").read_text())["packages"].items():
        assert f"| {package} | {number or '–'} | {number or '–'} |" in text


def test_without_a_validation_the_card_shows_the_last_step(here: Path, tmp_path: Path) -> None:
    run = here / "runs" / "sft" / "version_0"
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "hf"):
        (copy / name).symlink_to(run / name)
    (copy / "metrics.csv").write_text("epoch,step,train/loss,train/lr\n0,0,3.5,0.1\n0,1,3.25,\n")
    status, out, err = call("export", copy)
    assert (status, err) == (0, "")
    assert "random tokens" in out  # there are no samples
    text = (copy / "export" / "README.md").read_text()
    assert "training at step 1 " in text
    assert re.findall(r"^\| (train/\w+) \| (.*) \|$", text, flags=re.M) == [("train/loss", "3.25")]
    # Once is enough: what is there is never overwritten.
    status, out, err = call("export", copy)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "is there already" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["runs/none"], "error: runs/none: no such model folder"),
        (["runs"], "error: runs: no model in this folder"),
        (["model", "--merge"], "error: --merge: model holds a whole model"),
        (["runs/sft", "--merge", "--dequantize"], "error: --dequantize: runs/sft was not trained on a 4-bit base"),
        (["runs/sft", "--to=model"], "error: --to model: is there already"),
        (["runs/sft", "--merge", "--dtype=int8"], "dtype: expected"),
        (["runs/sft", "--push-to-hub=me/mine"], "error: --push_to_hub me/mine: offline (HF_HUB_OFFLINE is set)"),
        ([], "run"),
        (["runs/sft", "--merg"], "merg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line(here: Path, argv: list[str], words: str) -> None:
    before = sorted(here.rglob("*"))
    status, out, err = call("export", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(here.rglob("*")) == before


def test_help_names_every_option(here: Path) -> None:
    status, out, _ = call("export", "--help")
    assert status == 0
    for option in ("--merge", "--dequantize", "--dtype", "--base", "--to", "--push_to_hub", "--push-to-hub"):
        assert option in out


def test_a_modelfile_beside_whole_policies(here: Path, tmp_path: Path) -> None:
    """It speaks the run's own chat format; adapters and reward models have none."""
    import transformers

    for name, options in {"sft": (), "reward": ("--merge",)}.items():
        exported(name, tmp_path / name, *options)
        assert not (tmp_path / name / "Modelfile").exists()
        assert "Ollama" not in (tmp_path / name / "README.md").read_text()
    exported("sft", tmp_path / "merged", "--merge")
    lines = (tmp_path / "merged" / "Modelfile").read_text().splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    answer = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ).partition("Hi")[2]
    assert lines[1] == "FROM ./model.gguf"
    assert f'{{{{- if ne $before "assistant" }}}}{{{{ {json.dumps(answer)} }}}}{{{{- end }}}}"""' in lines
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in lines
    assert "- `Modelfile` is Ollama's" in (tmp_path / "merged" / "README.md").read_text()
