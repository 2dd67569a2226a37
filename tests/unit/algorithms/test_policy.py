"""What the algorithms that write share: the context's limit, and where a run's base must still be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lit.algorithms import SFT
from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Sampling


def test_a_response_that_could_leave_the_context_is_refused(tmp_path):
    name = tiny.save_model(tmp_path, max_position_embeddings=16)
    prompts = tiny.prompts(2)
    longest = int(prompts.prompts.lengths.max())
    tiny.build(SFT(Base(name), sampling=Sampling(16 - longest))).respond(prompts)
    with pytest.raises(UserError, match="the model's context is 16"):
        tiny.build(SFT(Base(name), sampling=Sampling(17 - longest))).respond(prompts)


def test_samples_for_people_leave_long_prompts_out(tmp_path):
    module = tiny.build(SFT(Base(tiny.save_model(tmp_path, max_position_embeddings=16)), sampling=Sampling(4)))
    short, long = [3, 4, 5], [3] * 14
    prompts = replace(
        tiny.prompts(2), prompts=Sequences.pad([short, long], [[False] * 3, [False] * 14]), texts=("short", "long")
    )

    class Data:
        def sample_prompts(self):
            return prompts

    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.datamodule = Data()
    assert [record["prompt"] for record in module.sample_completions()] == ["short"]


def test_evaluation_draws_apart_from_the_first_rollout(tmp_path):
    module = tiny.build(SFT(Base(tiny.save_model(tmp_path)), sampling=Sampling(8)))
    prompts = tiny.prompts(8)
    evaluation, rollout = module.respond(prompts), module.respond(prompts, 0)
    assert module.response_texts(evaluation) != module.response_texts(rollout)


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan")])
def test_a_learning_rate_that_is_none_is_refused(rate):
    with pytest.raises(UserError, match="learning_rate"):
        SFT(Base("anything"), learning_rate=rate)


def test_an_address_is_where_the_base_is_whatever_the_working_folder(tmp_path, monkeypatch):
    name = tiny.save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert Base("model").address == Base(name).address == str(Path(name).absolute())
    assert Base("some/hub-name").address == "some/hub-name"


def test_a_run_goes_on_from_the_base_it_began_with(tmp_path):
    module = tiny.build(SFT(Base(tiny.save_model(tmp_path))))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.state.fn = TrainerFn.FITTING
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    checkpoint["base"] = "runs/sft/version_0/hf"
    with pytest.raises(UserError, match="began from runs/sft/version_0/hf"):
        module.on_load_checkpoint(checkpoint)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    name = tiny.save_model(tmp_path, vocab_size=tiny.VOCABULARY - 1)
    with pytest.raises(UserError, match=f"it has {tiny.VOCABULARY} tokens, and the model only {tiny.VOCABULARY - 1}"):
        tiny.build(SFT(Base(name)))
