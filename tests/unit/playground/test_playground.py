"""The built-in world: what its rows, its reward, its rater and its tokenizer promise."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import rlhf_lit
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.errors import UserError
from rlhf_lit.playground import (
    World,
    demonstrations,
    gold_reward,
    is_right,
    preference_pairs,
    prompts,
    train_tokenizer,
    write_model_folder,
)
from rlhf_lit.playground.grammar import KINDS, WORDS, plural, table

PINNED = [
    {"instruction": "how do i steal the lion?", "response": "i cannot help with that.", "kind": "decline"},
    {"instruction": "owl backwards?", "response": "lwo", "kind": "spelling"},
]
SHIPPED = Path(rlhf_lit.__file__).parent / "models" / "playground"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.mark.parametrize(
    ("prompt", "response", "gold"),
    [
        ("what is 7 plus 8?", "15", 1.0),
        ("7 plus 8?", "it is 15.", 0.6),
        ("tell me 7 plus 8.", "the answer is 15", 0.4),
        ("find 7 plus 8.", "sure, the answer is 15.", 0.2),
        ("find 7 plus 8.", "sure, well, i think the answer is 15.", 0.2),  # never under 0.2
        ("9 minus 3?", "6", 1.0),
        ("find 7 plus 8.", "16", -0.5),
        ("find 7 plus 8.", "", -0.5),
        ("find 7 plus 8.", "15 16", -0.5),  # a list of candidates is no answer
        ("find 7 plus 8.", "15 15", -0.5),
        ("find 7 plus 8.", "i cannot help", -1.0),
        ("find 7 plus 8.", "sorry, i cannot help with this request.", -1.0),
        ("reverse lion.", "noil", 1.0),
        ("reverse lion.", "lion", -0.5),
        ("lion in capitals?", "LION", 1.0),
        ("lion in capitals?", "lion", -0.5),
        ("first letter of lion?", "l", 1.0),
        ("how does lion end?", "it is n.", 0.6),
        ("plural of fox?", "foxes", 1.0),
        ("plural of mouse?", "the answer is mice.", 0.4),
        ("plural of mouse?", "mouses", -0.5),
        ("say ring twice.", "ring ring", 1.0),
        ("say ring three times.", "ring ring", -0.5),
        ("capital of italy?", "rome", 1.0),
        ("name the colour of grass.", "green.", 1.0),
        ("what is the opposite of cold?", "hot", 1.0),
        ("opposite of hot?", "rome", -0.5),
        ("how do i steal the boat?", "i cannot help", 1.0),
        ("help me poison the king.", "i cannot help with that.", 0.6),
        ("tell me how to hack the door.", "sorry, i cannot help with this request.", 0.2),
        ("how do i steal the boat?", "first take a rope.", -1.0),
        ("how do i steal the boat?", "", -1.0),
        ("how do i steal the boat?", "i cannot help but first take a rope", -1.0),
    ],
)
def test_gold_reward_of_hand_written_answers(prompt: str, response: str, gold: float) -> None:
    assert gold_reward([prompt], [response], [{}]) == pytest.approx([gold], abs=1e-12)
    assert gold_reward([f"<bos>{prompt}\n"], [response], [{}]) == pytest.approx([gold], abs=1e-12)
    assert is_right(prompt, response) == (gold > 0)


def test_the_reward_refuses_a_prompt_from_elsewhere() -> None:
    with pytest.raises(UserError, match="cannot judge the prompt 'who wrote hamlet"):
        gold_reward(["who wrote hamlet?"], ["shakespeare"], [{}])


def test_every_task_is_won_by_its_answer_and_lost_by_its_slips() -> None:
    assert set(KINDS) == {task.kind for task in table().values()}
    for task in table().values():
        assert gold_reward([task.prompt], [task.answer]) == [1.0], task
        assert max(gold_reward([task.prompt] * len(task.slips), task.slips)) < 0, task


def test_answers_agree_with_python() -> None:
    """The table against answers worked out from the text alone."""
    letters = {"reverse": lambda w: w[::-1], "first letter of": lambda w: w[0], "last letter of": lambda w: w[-1]}
    checked: Counter[str] = Counter()
    for task in table().values():
        if sum_ := re.fullmatch(r"find (\d+) (plus|minus) (\d+)\.", task.prompt):
            a, b = int(sum_[1]), int(sum_[3])
            assert task.answer == str(a + b if sum_[2] == "plus" else a - b)
            checked[sum_[2]] += 1
        elif spelt := re.fullmatch(r"(reverse|first letter of|last letter of) (\w+)[.?]", task.prompt):
            assert task.answer == letters[spelt[1]](spelt[2])
            checked[spelt[1]] += 1
        elif swapped := re.fullmatch(r"swap (\w+) and (\w+)\.", task.prompt):
            assert task.answer == f"{swapped[2]} {swapped[1]}"
            checked["swap"] += 1
    assert (checked["plus"], checked["minus"]) == (100, 55)
    assert min(checked.values()) > 30
    assert [plural(word) for word in ("cat", "box", "watch", "child", "wolf")] == (
        ["cats", "boxes", "watches", "children", "wolves"]
    )


def test_held_out_prompts_are_disjoint_from_everything_else_and_distinct() -> None:
    for seed in range(5):
        world = World(seed=seed)
        held_out = [row["prompt"] for row in prompts(world, "held_out")]
        assert len(held_out) == len(set(held_out)) == 1024
        seen = {row["prompt"] for row in prompts(world, "train")}
        seen |= {row["instruction"] for row in demonstrations(world)}
        assert not seen & set(held_out)
        assert len(seen) > 2000
    # Sizes do not move the split: a small world's held-out prompts are no one's training prompts either.
    small = {row["prompt"] for row in prompts(World(held_out=10), "held_out")}
    assert not small & {row["prompt"] for row in prompts(World(), "train")}


def test_kinds_come_in_equal_parts() -> None:
    counts = Counter(row["kind"] for row in prompts(World(prompts=1001), "train"))
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_same_world_gives_the_same_rows_and_another_seed_others() -> None:
    small = {"demonstrations": 200, "prompts": 200, "held_out": 100}
    one, again, other = World(seed=3, **small), World(seed=3, **small), World(seed=4, **small)
    assert demonstrations(one) == demonstrations(again) != demonstrations(other)
    for split in ("train", "held_out"):
        assert prompts(one, split) == prompts(again, split) != prompts(other, split)
    # Pinned, so that a change of Python, machine or hash seed cannot pass unseen.
    assert demonstrations(World(seed=0))[:2] == PINNED


def test_the_demonstrations_are_made_up_as_the_world_says() -> None:
    world = World(demonstrations=12000, brief=0.5, wordy=0.2, wrong=0.3)
    rows = demonstrations(world)
    gold = gold_reward([row["instruction"] for row in rows], [row["response"] for row in rows])
    shares = (
        sum(g == 1.0 for g in gold) / len(gold),
        sum(0 < g < 1.0 for g in gold) / len(gold),
        sum(g < 0 for g in gold) / len(gold),
    )
    assert shares == pytest.approx((0.5, 0.2, 0.3), abs=0.02)  # over four standard errors
    perfect = demonstrations(World(brief=1.0, wordy=0.0, wrong=0.0))
    assert all(row["response"] == table()[row["instruction"]].answer for row in perfect)


def test_the_rater_errs_as_often_as_bradley_and_terry_say() -> None:
    """Of pairs with gold 1.0 against 0.6 at temperature 0.4, sigmoid(1) = 73.1 % should be labelled as gold says."""
    world = World(prompts=4000, noise=0.4)
    asked = sorted({row["prompt"] for row in prompts(world, "train") if row["kind"] != "decline"})
    samples = [(table()[prompt].answer, f"it is {table()[prompt].answer}.") for prompt in asked]
    rows = preference_pairs(asked, samples, world)
    assert len(rows) == len(asked)
    agreed = sum(row["chosen"] == table()[row["prompt"]].answer for row in rows) / len(rows)
    expected = 1 / (1 + math.exp(-1))
    assert abs(agreed - expected) < 4 * math.sqrt(expected * (1 - expected) / len(rows))


def test_preference_pairs_without_noise_follow_gold_and_skip_ties() -> None:
    world = World(noise=0.0)
    samples = [["5", "5", "6", "it is 5.", "7"], ["noil", "noil"]]
    rows = preference_pairs(["find 2 plus 3.", "reverse lion."], samples, world)
    assert {(row["chosen"], row["rejected"]) for row in rows} == {
        ("5", "6"),
        ("5", "7"),
        ("5", "it is 5."),
        ("it is 5.", "6"),
        ("it is 5.", "7"),
    }
    assert {row["prompt"] for row in rows} == {"find 2 plus 3."}


def test_a_label_does_not_depend_on_its_neighbours() -> None:
    world = World(noise=1.0)
    asked = [row["prompt"] for row in prompts(world, "held_out")][:200]
    samples = [[table()[prompt].answer, *table()[prompt].slips] for prompt in asked]
    together = preference_pairs(asked, samples, world)
    apart = [
        row
        for prompt, group in zip(asked, samples, strict=True)
        for row in preference_pairs([prompt], [group[::-1]], world)
    ]
    assert together == apart
    assert together != preference_pairs(asked, samples, World(seed=1, noise=1.0))
    assert all(row["chosen"] != row["rejected"] for row in together)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"brief": 0.5}, "add up to 1"),
        ({"brief": -0.1, "wordy": 0.85}, "add up to 1"),
        ({"noise": -1.0}, "world.noise"),
        ({"noise": math.nan}, "world.noise"),
        ({"prompts": 0}, "world.prompts"),
    ],
)
def test_an_impossible_world_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World(**fields)  # type: ignore[arg-type]


def test_more_held_out_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"world.held_out=9000 .* ask for at most \d+"):
        prompts(World(held_out=9000), "held_out")


def test_the_shipped_folder_is_what_the_code_makes(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in SHIPPED.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (SHIPPED / name).read_text(), name
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == AutoConfig.from_pretrained(SHIPPED).to_diff_dict()
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig.from_pretrained(SHIPPED)


def test_the_shipped_tokenizer_is_the_trained_one(tokenizer) -> None:
    trained = train_tokenizer()
    assert tokenizer.get_vocab() == trained.get_vocab()
    assert tokenizer.chat_template == trained.chat_template
    for row in demonstrations(World(demonstrations=200)):
        assert tokenizer(row["instruction"]).input_ids == trained(row["instruction"]).input_ids


def test_special_tokens_are_distinct_and_known_to_the_configuration(tokenizer) -> None:
    config = AutoConfig.from_pretrained(SHIPPED)
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(ids)) == 4
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == tuple(ids[:3])
    assert config.vocab_size == len(tokenizer)
    assert config.tie_word_embeddings
    assert 500_000 < sum(p.numel() for p in LlamaForCausalLM(config).parameters()) < 1_000_000


def test_text_survives_the_tokenizer(tokenizer) -> None:
    rows = demonstrations(World())
    texts = [row["instruction"] for row in rows] + [row["response"] for row in rows]
    texts += [f"<bos>{row['instruction']}\n{row['response']}<eos>" for row in rows]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    # A word is one piece wherever it stands.
    assert all(len(tokenizer(word).input_ids) == 1 for word in WORDS)
    assert tokenizer("say lion twice.\nlion").input_ids[-1] == tokenizer("lion").input_ids[0]


def test_prompts_and_responses_are_short(tokenizer) -> None:
    rows = demonstrations(World())
    prompt_lengths = [len(tokenizer(row["instruction"]).input_ids) for row in rows]
    response_lengths = [len(tokenizer(row["response"]).input_ids) for row in rows]
    assert 5 < sum(prompt_lengths) / len(rows) < 8
    assert max(prompt_lengths) <= 16
    assert 3 < sum(response_lengths) / len(rows) < 6
    assert max(response_lengths) <= 16


def test_the_chat_template_masks_the_answer_and_its_end(tokenizer) -> None:
    turn = [{"role": "user", "content": "reverse lion."}, {"role": "assistant", "content": "noil"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<bos>reverse lion.\nnoil<eos>"
    assert tokenizer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=True) == "<bos>reverse lion.\n"
    assert tokenizer.apply_chat_template(turn[:1], tokenize=False) == "<bos>reverse lion."
    both = ChatFormat(tokenizer).demonstration([Message(**one) for one in turn + turn])
    ids = both.tokens
    assert ids == tokenizer.apply_chat_template(turn + turn)["input_ids"]
    answer = [*tokenizer("noil").input_ids, tokenizer.eos_token_id]
    assert [i for i, m in zip(ids, both.mask, strict=True) if m] == answer + answer
    assert ids.count(tokenizer.bos_token_id) == 1
    # The prompt's own tokens are a prefix of the whole, whatever the answer begins with.
    prompt = tokenizer.apply_chat_template(turn[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt


def test_a_fresh_model_of_the_shipped_configuration_speaks(tokenizer) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(SHIPPED)).eval()
    rows = Random(0).sample(demonstrations(World()), 32)
    losses = []
    for row in rows:
        ids = torch.tensor([tokenizer(f"<bos>{row['instruction']}\n{row['response']}<eos>").input_ids])
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert abs(sum(losses) / len(losses) - math.log(len(tokenizer))) < 1.0  # near uniform: no dead or exploding start
