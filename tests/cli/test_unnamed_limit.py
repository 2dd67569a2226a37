"""A number of new tokens that nobody named is refused by no context: chat, predictions, samples, evaluations."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_lit.algorithms import SFT
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import UNNAMED_LIMIT, Sampling

CONTEXT = 48


class Terminal(io.StringIO):
    """Lines that are typed."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def small(place: Path) -> Path:
    """The tiny model, with a context of ``CONTEXT`` tokens, one for each byte."""
    file = Path("tiny", "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": CONTEXT}))
    return place


@pytest.fixture
def chat(run: Callable, small: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``chat(lines, *options)``: what is said to them, piped or typed."""

    def call(lines: str, *options: str, typed: bool = False):
        monkeypatch.setattr("sys.stdin", (Terminal if typed else io.StringIO)(lines))
        return run("chat", "tiny", *options)

    return call


def prompts_of(module: SFT, *texts: str) -> PromptBatch:
    chat = ChatFormat(module.tokenizer)
    tokens = [chat.prompt([Message("user", text)]) for text in texts]
    asked = Sequences.pad(tokens, [[False] * len(row) for row in tokens])
    rows = torch.arange(len(texts))
    return PromptBatch(asked, rows, rows * 0, texts, ({},) * len(texts), 512)


def built(sampling: Sampling) -> SFT:
    module = SFT(Base("tiny"), sampling=sampling)
    module.configure_model()
    return module.eval()


def test_chat_takes_what_the_context_leaves(chat: Callable) -> None:
    answer = chat("hi\n")
    assert (answer.status, answer.err.count("\n")) == (0, 1)
    assert answer.err.startswith("note: the answer ends where the model's context does; /reset forgets")
    assert answer.out.strip()


def test_a_conversation_that_fills_the_context_ends_in_one_line(chat: Callable) -> None:
    answer = chat("hi\nand now?\n")
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith("error: the conversation has ")
    assert answer.err.splitlines()[-1].endswith(" tokens and fills the model's context; /reset forgets it")
    assert chat("hi\n/reset\nhi\n").status == 0
    assert chat("hi\nhi\n", "--single_turn=true").status == 0


def test_at_a_terminal_the_conversation_goes_on(chat: Callable) -> None:
    answer = chat("hi\nand now?\n/reset\nhi\n/quit\nnever\n", typed=True)
    assert answer.status == 0
    said = [line.split(":")[0] for line in answer.err.splitlines()]
    assert said == ["note", "error", "note"]
    refused = chat("hi\nhi\n", f"--sampling.max_new_tokens={CONTEXT}", typed=True)
    assert (refused.status, refused.err.count("error: model.sampling.max_new_tokens: after the prompt")) == (0, 2)


def test_ctrl_c_gives_up_one_answer(chat: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_lit.commands.chat.draw", interrupt)
    answer = chat("hi\nhi\n", typed=True)
    assert (answer.status, answer.err) == (0, "interrupted; the turn is forgotten\n" * 2)
    assert chat("hi\nhi\n").status == 130


def test_a_number_that_is_named_and_does_not_fit_is_refused(chat: Callable) -> None:
    answer = chat("hi\n", f"--sampling.max_new_tokens={CONTEXT}")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("error: model.sampling.max_new_tokens: after the prompt 'hi' a response may reach ")
    assert answer.err.count("\n") == 1


def test_each_prompt_has_what_its_own_length_leaves(small: Path) -> None:
    """The limit of a row is its own: alone it is answered by the same tokens as in company."""
    module = built(Sampling())
    prompts = prompts_of(module, "hi", "hi there, you", "ho", "what is one and one?")
    samples = module.respond(prompts)
    rooms = CONTEXT - prompts.prompts.lengths
    answered = samples.sequences.mask.sum(-1)
    assert len(set(rooms.tolist())) == 3
    assert ((answered == rooms) | samples.ended).all()
    assert (answered == rooms).any()
    for row in range(4):
        alone = module.respond(prompts.select(torch.tensor([row])))
        mask = samples.sequences.mask[row]
        assert samples.sequences.tokens[row][mask].tolist() == alone.sequences.tokens[alone.sequences.mask].tolist()
        own = alone.sampled_logprobs[alone.sequences.mask]
        torch.testing.assert_close(samples.sampled_logprobs[row][mask], own, atol=1e-6, rtol=0)
        assert bool(samples.ended[row]) == bool(alone.ended[0])


def test_a_context_with_room_has_the_usual_limit(place: Path) -> None:
    module = built(Sampling())
    assert int(module.respond(prompts_of(module, "hi", "ho")).sequences.mask.sum(-1).max()) == UNNAMED_LIMIT


def test_a_prompt_that_fills_the_context_is_named(run: Callable, small: Path) -> None:
    Path("long.jsonl").write_text(json.dumps({"prompt": "x" * CONTEXT, "completion": "y"}) + "\n")
    answer = predict(run, "long.jsonl")
    assert answer.status == 2
    assert "leaves no room for a response in the model's context of 48; shorten it, or lower" in answer.err


def predict(run: Callable, file: str):
    base = ["--config=sft.yaml", "--model.sampling.max_new_tokens=null", f"--data.predict.path={file}"]
    return run("predict", *base, "--data.max_length=512")


def test_predictions_samples_and_evaluations(run: Callable, small: Path) -> None:
    answer = predict(run, "sft.jsonl")
    assert answer.status == 0, answer.err
    predictions = [json.loads(line) for line in Path("runs/sft/version_0/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 32
    assert max(row["tokens"] for row in predictions) < CONTEXT
    few = ["--trainer.max_steps=1", "--preflight=false", "--model.sampling.max_new_tokens=null"]
    assert run("fit", "--config=sft.yaml", *few).status == 0
    assert len(Path("runs/sft/version_1/samples.jsonl").read_text().splitlines()) == 8
    options = ["--prompts.path=sft.jsonl", "--prompts.limit=4", "--baseline=tiny", "--to=found"]
    judge = ["--judge=RewardFromFunction", "--judge.function=test_command_line.brevity"]
    answer = run("evaluate", "tiny", *options, *judge)
    assert answer.status == 0, answer.err
    assert "4 of 4 rows used" in answer.err


def test_ppo_draws_what_the_context_leaves_and_memory_measures_it(run: Callable, small: Path) -> None:
    options = ["--config=ppo.yaml", "--model.sampling.max_new_tokens=null", "--trainer.max_steps=1"]
    answer = run("fit", *options)
    assert answer.status == 0, answer.err
    answer = run("memory", *options)
    assert answer.status == 0, answer.err
    assert f"rows of {CONTEXT} tokens" in answer.out


def test_null_is_no_number_of_tokens() -> None:
    assert Sampling().limit == UNNAMED_LIMIT
    assert replace(Sampling(), max_new_tokens=3).limit == 3
    with pytest.raises(ValueError, match="at least 1"):
        Sampling(max_new_tokens=0)
