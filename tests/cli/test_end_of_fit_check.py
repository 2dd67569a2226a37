"""Modules that an adapter trains in full, from a run to the next; and what ends a run whose export went wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm

TOKENS = torch.arange(5, 25)[None]
SHORT = ("--trainer.max_steps=3", "--trainer.max_epochs=-1", "--trainer.enable_progress_bar=false")
IN_FULL = (
    "--model.base.lora.rank=4", "--model.base.lora.modules_to_save=[lm_head, embed_tokens, norm]",
    "--model.learning_rate=0.05",
)  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def test_modules_in_full_go_from_run_to_run_and_into_a_merge(run: Callable, place: Path) -> None:
    answer = run("fit", "--config=sft.yaml", "--name=first", *SHORT, *IN_FULL)
    assert answer.status == 0, answer.err
    first = Path("runs/first/version_0")
    stored = load_file(first / "hf" / "adapter_model.safetensors")
    base = load_file("tiny/model.safetensors")
    for part in ("lm_head", "model.embed_tokens", "model.norm"):
        assert not stored[f"base_model.model.{part}.weight"].equal(base[f"{part}.weight"]), part
    checkpoint = torch.load(first / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert any(".lm_head.modules_to_save.default.weight" in name for name in checkpoint)
    assert not any("original_module" in name for name in checkpoint)
    ours = logits(load_causal_lm(Base("runs/first")))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny"), str(first / "hf")).eval()
    assert logits(plain).equal(ours)

    answer = run("export", "runs/first", "--merge", "--to=whole")
    assert answer.status == 0, answer.err
    merged = logits(AutoModelForCausalLM.from_pretrained("whole"))
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)
    assert float((logits(AutoModelForCausalLM.from_pretrained("tiny")) - ours).abs().max()) > 0.1

    # The next stage begins where this one ended: no step at a rate of 0.
    still = ("--model.learning_rate=1e-12", "--model.base.name=runs/first")
    answer = run("fit", "--config=dpo.yaml", "--name=second", *SHORT, *still)
    assert answer.status == 0, answer.err
    torch.testing.assert_close(logits(load_causal_lm(Base("runs/second"))), ours, rtol=0, atol=1e-6)
    # And a run goes on from its checkpoint.
    more = ("--trainer.max_steps=5", "--trainer.max_epochs=-1")
    answer = run("fit", "--config=sft.yaml", "--name=first", *IN_FULL, *more, "--ckpt_path=last")
    assert answer.status == 0, answer.err


def dropped(folder: Path, name: str) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def nudged(folder: Path, name: str) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights[name].view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


WHOLE = "model.layers.0.mlp.up_proj.weight"
ADAPTER = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "options", "name", "said"),
    [
        (dropped, (), WHOLE, "is not in the file"),
        (nudged, (), WHOLE, "is up to 1 away from the one in memory"),
        (dropped, ("--model.base.lora.rank=4",), ADAPTER, "is not in the file"),
    ],
    ids=["a tensor is lost", "one is off", "one of an adapter is lost"],
)
def test_a_run_whose_export_is_not_its_model_ends_with_the_tensors_name(
    run: Callable, place: Path, monkeypatch: pytest.MonkeyPatch, harm: Any, options: Any, name: str, said: str
) -> None:
    from rlhf_lit.trainer import callbacks

    whole = callbacks.save_hf

    def harmful(module: Any, folder: Path, weights: Any) -> None:
        whole(module, folder, weights)
        harm(folder, name)

    monkeypatch.setattr(callbacks, "save_hf", harmful)
    answer = run("fit", "--config=sft.yaml", "--name=harmed", *SHORT, *options)
    assert answer.status == 2
    line = answer.err.splitlines()[-1]
    assert f"harmed/version_0/hf.refused: what was saved is not the model that was trained: {name} {said}" in line
    folder = Path("runs/harmed/version_0")
    assert not (folder / "hf").exists()
    assert not list(folder.glob("*.partial"))
    assert list((folder / "hf.refused").glob("*.safetensors"))
    # No later stage takes it for a model, and nothing is lost.
    following = run("fit", "--config=dpo.yaml", "--name=next", *SHORT, "--model.base.name=runs/harmed")
    assert following.status == 2
    assert "runs/harmed" in following.err
    monkeypatch.setattr(callbacks, "save_hf", whole)
    again = run("fit", "--config=sft.yaml", "--name=harmed", *SHORT, *options, "--ckpt_path=last")
    assert again.status == 0, again.err
    assert (folder / "hf").is_dir()


def test_an_export_that_lost_a_tensor_ends_with_its_name(
    run: Callable, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_lit.commands import export as command

    assert run("fit", "--config=sft.yaml", "--name=good", *SHORT, "--model.base.lora.rank=4").status == 0
    whole = command.write_model

    def harmful(model: Any, tokenizer: Any, folder: Path, scorer: bool) -> None:
        whole(model, tokenizer, folder, scorer)
        nudged(folder, WHOLE)

    monkeypatch.setattr(command, "write_model", harmful)
    answer = run("export", "runs/good", "--merge", "--to=whole")
    assert answer.status == 2
    assert f"what was saved is not the model in memory: {WHOLE} is up to 1 away" in answer.err
    assert not Path("whole").exists()
