"""Files → tokens → batches: what is counted, cached, split and limited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lit.batches import PreferenceBatch, SupervisedBatch
from rlhf_lit.data.modules import PreferenceDataModule, RolloutDataModule, SFTDataModule, TextDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import PLAYGROUND
from rlhf_lit.playground import World

ROWS = [{"prompt": f"what is {i} plus {i}?", "completion": f"it is {2 * i}."} for i in range(20)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"no, {i}"} for i, row in enumerate(ROWS)]


def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PLAYGROUND)


def ready(module: TextDataModule, stage: str = "fit", own: PreTrainedTokenizerBase | None = None) -> Any:
    """The module after ``setup``, with a trainer that has nothing but a tokenizer."""
    algorithm = SimpleNamespace(tokenizer=own or tokenizer())
    module.trainer = SimpleNamespace(lightning_module=algorithm, global_rank=0, world_size=1)  # type: ignore[assignment]
    module.setup(stage)
    return module


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Source]:
    def write(rows: list[Any], name: str = "rows.jsonl", **options: Any) -> Source:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(str(path), **options)

    return write


def prompts_of(examples: list[dict[str, Any]]) -> list[int]:
    return [row["row"] for row in examples]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_sft_batches_hold_the_rows_tokens(file) -> None:
    module = ready(SFTDataModule(file(ROWS), batch_size=8, micro_batch_tokens=64, cache=None))
    batches = list(module.train_dataloader())
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert all(isinstance(batch, SupervisedBatch) and batch.micro_batch_tokens == 64 for batch in batches)
    own = tokenizer()
    answers = set()
    for batch in batches:
        for tokens, mask, length in zip(
            batch.sequences.tokens, batch.sequences.mask, batch.sequences.lengths, strict=True
        ):
            answers.add(own.decode(tokens[mask]))
            assert not mask[length:].any()
            assert tokens[length - 1] == own.eos_token_id
    assert {answer.removesuffix(own.eos_token).strip() for answer in answers} == {row["completion"] for row in ROWS}


def test_preference_batches_hold_both_sides(file) -> None:
    pairs = [{**pair, "score_chosen": 5.0, "score_rejected": i} for i, pair in enumerate(PAIRS[:5])]
    module = ready(PreferenceDataModule(file(pairs), batch_size=5, cache=None))
    (batch,) = module.batches_in_order(5)
    assert isinstance(batch, PreferenceBatch)
    assert batch.margin.tolist() == [5.0, 4.0, 3.0, 2.0, 1.0]
    own = tokenizer()
    for side, texts in ((batch.chosen, "chosen"), (batch.rejected, "rejected")):
        found = [
            own.decode(row[mask], skip_special_tokens=True).strip()
            for row, mask in zip(side.tokens, side.mask, strict=True)
        ]
        assert found == [pair[texts] for pair in pairs]


# --- what is left out ------------------------------------------------------------------------------------------------


def test_hh_is_accounted_for_row_by_row(real_data: Path) -> None:
    """4 empty answers, 5 pairs whose prompts differ, and nothing else but what is too long."""
    path = real_data / "hh_harmless_test" / "test.jsonl.gz"
    own = AutoTokenizer.from_pretrained(real_data / "stories260k" / "hf")
    whole = ready(
        PreferenceDataModule(Source(str(path)), max_length=100_000, template="plain", cache=None), own=own
    )  # fmt: skip
    report = whole.reports["train"]
    assert report.counts == {"empty chosen": 4, "prompts differ": 5}
    assert report.first_rows == {
        "empty chosen": [86, 516, 925, 1103],
        "prompts differ": [1254, 1688, 1950, 1952, 2036],
    }
    assert (report.total, report.used, len(whole.examples["train"])) == (2312, 2303, 2303)

    def longest(row: dict[str, Any]) -> int:
        return max(len(row["chosen"]), len(row["rejected"]))

    fits = sum(longest(row) <= 256 for row in whole.examples["train"])
    cut = ready(
        PreferenceDataModule(
            Source(str(path)), max_length=256, truncation="drop", template="plain", cache=None
        ),
        own=own,
    )  # fmt: skip
    assert cut.reports["train"].counts == {"empty chosen": 4, "prompts differ": 5, "over-long": 2303 - fits}
    assert len(cut.examples["train"]) == cut.reports["train"].used == fits
    assert max(map(longest, cut.examples["train"])) <= 256


def test_zero_supervised_tokens_are_counted(file) -> None:
    """A tokenizer that knows a and b alone loses the whole of "日本", and an answer's first token is never one."""
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    lossy = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    rows = file([{"text": "abab"}, {"text": "日本"}, {"text": "ba"}])
    module = ready(SFTDataModule(rows, template="none", cache=None), own=lossy)
    assert module.reports["train"].counts == {"zero supervised tokens": 1}
    assert module.reports["train"].first_rows == {"zero supervised tokens": [1]}
    assert prompts_of(module.examples["train"]) == [0, 2]


def test_a_row_that_cannot_be_encoded_is_fatal_where_asked(file) -> None:
    long = {"prompt": "what is this?", "completion": "many words " * 50}
    rows = file([ROWS[0], long])
    kept = ready(SFTDataModule(rows, max_length=64, cache=None))
    assert kept.reports["train"].counts == {"over-long": 1}
    assert prompts_of(kept.examples["train"]) == [0]
    with pytest.raises(UserError, match="row 1: over-long"):
        ready(SFTDataModule(rows, max_length=64, on_bad_row="error", cache=None))


def test_limit_counts_usable_rows(file) -> None:
    module = ready(SFTDataModule(file([{"prompt": None, "completion": "x"}, *ROWS], limit=4), cache=None))
    assert prompts_of(module.examples["train"]) == [1, 2, 3, 4]


# --- the cache -------------------------------------------------------------------------------------------------------


class Counting(SFTDataModule):
    """Counts the rows it has to tokenise."""

    encoded = 0

    def row(self, record: Any, encoded: Any) -> Any:
        self.encoded += 1
        return super().row(record, encoded)


def test_tokens_are_found_again_by_content(file, tmp_path) -> None:
    cache = str(tmp_path / "cache")

    def again(source: Source, own: PreTrainedTokenizerBase | None = None, **options: Any) -> Counting:
        return ready(Counting(source, cache=cache, **options), own=own)

    first = again(file(ROWS))
    assert first.encoded == 20
    same = again(file(ROWS))
    assert same.encoded == 0
    assert list(same.examples["train"]) == list(first.examples["train"])

    renamed = again(file(ROWS, "other.jsonl"))
    assert renamed.encoded == 0, "the same content under another file's name"
    assert renamed.reports["train"].file == "other.jsonl"
    noted = again(file([{**row, "note": i} for i, row in enumerate(ROWS)]))
    assert noted.encoded == 20
    assert [row["source"]["note"] for row in noted.examples["train"]] == list(range(20)), "with their own rows"
    assert [row["tokens"] for row in noted.examples["train"]] == [row["tokens"] for row in first.examples["train"]]

    assert again(file([*ROWS[:-1], {**ROWS[-1], "completion": "changed"}])).encoded == 20, "the name, another content"
    assert again(file(ROWS[::-1])).encoded == 20
    assert again(file(ROWS), template="none").encoded == 20
    assert again(file(ROWS), max_length=100).encoded == 20
    assert again(file(ROWS), truncation="drop").encoded == 20
    other = tokenizer()
    other.add_tokens(["<extra>"])
    assert again(file(ROWS), own=other).encoded == 20
    assert again(file(ROWS)).encoded == 0
    assert again(file(ROWS), batch_size=3, micro_batch_tokens=10).encoded == 0, "batches change no tokens"


def test_without_a_cache_nothing_is_written(file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ready(SFTDataModule(file(ROWS), cache=None))
    assert not (tmp_path / "home").exists()


# --- splits ----------------------------------------------------------------------------------------------------------


def test_a_held_out_fraction_is_always_the_same(file, monkeypatch) -> None:
    found = []
    for seed in ("0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.manual_seed(int(seed))
        module = ready(SFTDataModule(file(ROWS), validation_fraction=0.25, cache=None))
        found.append({name: prompts_of(module.examples[name]) for name in ("train", "validation")})
    assert found[0] == found[1]
    train, held_out = found[0]["train"], found[0]["validation"]
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out) == list(range(20))
    assert held_out != list(range(15, 20)), "drawn, not the last ones"


def test_validate_holds_out_the_rows_that_fit_held_out(file) -> None:
    options: dict[str, Any] = {"validation_fraction": 0.25, "cache": None}
    fitted = ready(SFTDataModule(file(ROWS), **options))
    validated = ready(SFTDataModule(file(ROWS), **options), "validate")
    assert list(validated.examples["validation"]) == list(fitted.examples["validation"])


def test_a_file_of_its_own(file) -> None:
    module = ready(SFTDataModule(file(ROWS), validation=file(ROWS[:3], "held_out.jsonl"), cache=None))
    assert [len(module.examples[name]) for name in ("train", "validation")] == [20, 3]
    ready(module, "predict")
    assert len(module.examples["predict"]) == 3, "the validation rows, where nothing else is named"
    with pytest.raises(UserError, match="name the rows to test"):
        ready(module, "test")


def test_the_built_in_worlds_splits_are_disjoint() -> None:
    small = World(prompts=64, held_out=16)
    module = ready(
        RolloutDataModule(
            train=Source("playground", world=small),
            validation=Source("playground", split="held_out", world=small),
            rollout_size=16, batch_size=16, cache=None,
        )
    )  # fmt: skip
    texts = [{row["text"] for row in module.examples[name]} for name in ("train", "validation")]
    assert len(texts[1]) == 16
    assert not texts[0] & texts[1]


def test_parts_of_two_worlds_are_refused() -> None:
    """Each seed splits the world otherwise: what one holds out, another may train on."""
    with pytest.raises(UserError, match=r"^data.validation.world.seed: 0 splits .* data.train.world.seed: 3, .* alike"):
        RolloutDataModule(
            train=Source("playground", world=World(seed=3)), validation=Source("playground", split="held_out")
        )


def test_a_world_belongs_to_the_playground_alone() -> None:
    assert Source("rows.jsonl", world=None).world is None
    with pytest.raises(
        UserError, match=r"^world: it makes up the rows of the path playground alone, .* of rows\.jsonl; set it to null"
    ):
        Source("rows.jsonl", world=World(seed=3))


# --- what the user can get wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"micro_batch_tokens": 0}, "data.micro_batch_tokens must be at least 1"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction must lie in \[0, 1\)"),
        ({"validation_fraction": 0.1, "validation": Source("x.jsonl")}, "data.validation_fraction: leave it out"),
    ],
)
def test_options_that_cannot_be(options, complaint) -> None:
    with pytest.raises(UserError, match=complaint):
        SFTDataModule(Source("rows.jsonl"), **options)


def test_the_rows_to_train_on_must_be_named() -> None:
    with pytest.raises(UserError, match="name the training rows"):
        ready(SFTDataModule(cache=None))


def test_a_minibatch_must_divide_the_rollout() -> None:
    with pytest.raises(UserError, match=r"data.batch_size: 24 does not divide the 64 episodes"):
        RolloutDataModule(train=Source("rows.jsonl"), rollout_size=32, samples_per_prompt=2, batch_size=24)


# --- the length of a PPO run -----------------------------------------------------------------------------------------


def rollouts(source: Source, trainer: Trainer, episodes: int | None) -> RolloutDataModule:
    """Two prompts answered three times each: six episodes a rollout, in 2 passes of 3 steps."""
    module = RolloutDataModule(
        train=source, rollout_size=2, samples_per_prompt=3, batch_size=2, ppo_epochs=2, episodes=episodes, cache=None
    )
    module.trainer = trainer
    trainer.strategy._lightning_module = SimpleNamespace(tokenizer=tokenizer())  # type: ignore[assignment]
    module.setup("fit")
    return module


QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}


@pytest.mark.parametrize(("episodes", "steps"), [(6, 6), (7, 12), (12, 12), (1, 6)])
def test_episodes_set_the_number_of_steps(file, episodes, steps) -> None:
    trainer = Trainer(max_epochs=-1, **QUIET)
    module = rollouts(file(ROWS), trainer, episodes)
    assert trainer.max_steps == steps
    module.setup("fit")  # a second time, as Lightning may
    assert trainer.max_steps == steps
    assert len(module.train_dataloader()) == 10 * 6, "one pass over twenty prompts"


def test_no_number_of_epochs_ends_a_run_before_its_episodes(file) -> None:
    """Left alone, Lightning would stop at a thousand passes: few prompts in large rollouts are soon there."""
    trainer = Trainer(**QUIET)
    rollouts(file(ROWS), trainer, 12)
    assert trainer.max_epochs == -1
    assert trainer.max_steps == 12


def test_a_trials_fewer_steps_stand(file) -> None:
    """As configs/overlays/debug.yaml sets them."""
    trainer = Trainer(max_steps=2, **QUIET)
    rollouts(file(ROWS), trainer, 12)
    assert trainer.max_steps == 2


@pytest.mark.parametrize("limit", [{"max_steps": 13}, {"max_epochs": 2}, {"max_epochs": -1, "max_steps": 13}])
def test_episodes_and_the_trainers_limits_exclude_each_other(file, limit) -> None:
    with pytest.raises(UserError, match=r"data.episodes sets the length of the run"):
        rollouts(file(ROWS), Trainer(**limit, **QUIET), 12)


def test_without_episodes_the_trainers_limit_stands(file) -> None:
    trainer = Trainer(max_steps=5, **QUIET)
    rollouts(file(ROWS), trainer, None)
    assert trainer.max_steps == 5


# --- what would have gone wrong in silence ---------------------------------------------------------------------------


def test_a_cache_leaves_the_random_state_alone(file, tmp_path: Path) -> None:
    """Else new adapters and heads would differ between a first run and a second one."""
    source, state = file(ROWS), torch.get_rng_state()
    for _ in ("written", "found"):
        ready(SFTDataModule(source, cache=str(tmp_path / "cache")))
        assert torch.equal(torch.get_rng_state(), state)


def test_the_worlds_demonstrations_do_not_pass_for_held_out_ones() -> None:
    with pytest.raises(UserError, match=r"demonstrations in the split train alone, not 'held_out'"):
        ready(SFTDataModule(Source("playground"), validation=Source("playground", split="held_out"), cache=None))


def test_rows_without_a_prompt_are_not_answered(file) -> None:
    """Plain text, no template, no BOS: there is nothing to continue."""
    own = tokenizer()
    own.bos_token = None
    rows = [{"text": "lamp and door"}, {"text": "door and lamp"}]
    module = ready(SFTDataModule(file(rows), predict=file(rows, "other.jsonl"), template="none", cache=None), own=own)
    assert len(module.examples["train"]) == 2
    assert module.sample_prompts() is None
    module.setup("predict")
    assert module.predict_dataloader() == []


@pytest.mark.parametrize("kind", [SFTDataModule, PreferenceDataModule])
def test_a_rows_prompt_is_cut_like_the_row(file, kind) -> None:
    rows = [{**PAIRS[0], "completion": "lamp", "prompt": " ".join(["door"] * 60)}]
    module = ready(kind(file(rows), max_length=24, cache=None))
    (row,) = module.examples["train"]
    assert len(row["prompt"]) <= 24
    assert row["prompt"][0] == tokenizer().bos_token_id


# --- ranks -----------------------------------------------------------------------------------------------------------


def held_out(source: Source, rank: int, world: int) -> Any:
    module = ready(SFTDataModule(validation=source, batch_size=1, cache=None), "validate")
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return module.val_dataloader()


def test_each_rank_has_held_out_rows(file) -> None:
    """Ranks add their numbers up together: one that had none, whatever the batch size, would be waited for forever."""
    shares = [list(held_out(file(ROWS[:5]), rank, 3)) for rank in range(3)]
    assert [[len(batch) for batch in share] for share in shares] == [[1, 1], [1, 1], [1, 0]]


def test_too_few_held_out_rows_for_the_ranks(file) -> None:
    with pytest.raises(UserError, match=r"data\.validation: 2 rows are too few for 3 ranks"):
        held_out(file(ROWS[:2]), 0, 3)


# --- which answers are learned ---------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]


@pytest.mark.parametrize(("last_turn_only", "learned"), [(False, ["first", "second"]), (True, ["second"])])
def test_every_answer_is_learned_or_the_last_alone(file, tmp_path: Path, last_turn_only: bool, learned: list) -> None:
    """The two have stores of their own."""
    source = file([{"messages": TURNS}])
    module = ready(SFTDataModule(source, last_turn_only=last_turn_only, cache=str(tmp_path / "cache")))
    ready(SFTDataModule(source, last_turn_only=not last_turn_only, cache=str(tmp_path / "cache")))
    own = tokenizer()
    for _ in range(2):
        (row,) = module.examples["train"]
        kept = [token for token, mask in zip(row["tokens"], row["mask"], strict=True) if mask]
        assert own.decode(kept).replace(own.eos_token, " ").split() == learned
        module = ready(SFTDataModule(source, last_turn_only=last_turn_only, cache=str(tmp_path / "cache")))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_answers_that_a_template_leaves_out_are_counted(file, capsys) -> None:
    """A template that forgets all but the last question."""
    own = tokenizer()
    own.chat_template = (
        "{% for message in messages[-2:] %}{{ message['role'] + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    module = ready(SFTDataModule(file([{"messages": TURNS}, ROWS[0]]), cache=None), own=own)
    assert module.reports["train"].unsupervised == 1
    assert "train: rows.jsonl: answers not supervised: 1, since the chat template" in capsys.readouterr().err
