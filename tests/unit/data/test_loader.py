"""The loaders: what they hand out is a function of (seed, epoch, step), and a counter is all they remember."""

from __future__ import annotations

import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lit.batches import ExperienceBatch, PromptBatch, Sequences, SupervisedBatch
from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.data.mixture import shuffled
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.loop import RolloutLoader


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return monkeypatch


def numbered(rows: list[int]) -> SupervisedBatch:
    """A batch that carries its rows' numbers as tokens."""
    return SupervisedBatch(Sequences.pad([[row] for row in rows], [[False] for _ in rows]), 1)


def loader(size: int = 23, batch_size: int = 4, shuffle: bool = True, rank: int = 0, world: int = 1) -> BatchLoader:
    return BatchLoader(list(range(size)), batch_size, numbered, shuffled(size) if shuffle else None, rank, world)


def rows_of(batch: Any) -> list[int]:
    return batch.sequences.tokens[:, 0].tolist()


def epoch(of: Any) -> list[list[int]]:
    return [rows_of(batch) for batch in of]


# --- BatchLoader -----------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_cut_into_batches() -> None:
    batches = epoch(loader())
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert len(loader()) == 6
    flat = [row for batch in batches for row in batch]
    assert sorted(flat) == list(range(23))
    assert flat != list(range(23))


def test_without_shuffle_the_order_is_the_files() -> None:
    plain = loader(shuffle=False)
    for _ in range(2):
        assert [row for batch in epoch(plain) for row in batch] == list(range(23))


def test_the_order_is_a_function_of_seed_and_epoch(seed: pytest.MonkeyPatch) -> None:
    first, again = loader(), loader()
    zero, one = epoch(first), epoch(first)
    torch.manual_seed(123)  # history does not matter
    torch.rand(5)
    assert epoch(again) == zero
    assert epoch(again) == one
    assert zero != one
    seed.setenv("PL_GLOBAL_SEED", "1")
    assert epoch(loader()) != zero


@pytest.mark.parametrize("step", [1, 3, 5, 6, 8])
def test_state_resumes_in_the_middle(step: int) -> None:
    """As Lightning drives it: it takes ``len`` batches of each iterator, and never exhausts it."""

    def stream(of: BatchLoader, count: int) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < count:
            for batch in of:
                found.append(rows_of(batch))
                if len(found) == count or of.position == 0:
                    break
        return found

    whole = stream(loader(), 12)
    broken = loader()
    before = stream(broken, step)
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    assert before + stream(resumed, 12 - step) == whole
    assert broken.state_dict() == {"epoch": step // 6, "position": step % 6}


def test_a_place_past_the_end_of_an_epoch_in_larger_batches_is_the_next_epoch() -> None:
    resumed, whole = loader(batch_size=8), loader(batch_size=8)
    resumed.load_state_dict({"epoch": 0, "position": 4})  # of 6 batches of 4; there are 3 of 8
    epoch(whole)
    assert epoch(resumed) == epoch(whole)


def test_asking_for_an_iterator_uses_nothing_up() -> None:
    """Lightning calls ``iter`` two or three times."""
    untouched, asked = loader(), loader()
    iter(asked)
    iter(asked)
    assert asked.state_dict() == {"epoch": 0, "position": 0}
    assert epoch(asked) == epoch(untouched)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_partition_every_batch(world: int) -> None:
    whole = [set(batch) for batch in epoch(loader())]
    shares = [epoch(loader(rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert sum(map(len, parts)) == len(batch)
        assert set().union(*parts) == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- RolloutLoader ---------------------------------------------------------------------------------------------------


class Policy:
    """Stands for the running module: answers with as many tokens as the prompt's number says, and keeps count."""

    def __init__(self) -> None:
        self.spent = False
        self.asked: list[tuple[int, list[int], list[int]]] = []

    def __call__(self, prompts: PromptBatch, rollout: int) -> ExperienceBatch:
        numbers = prompts.prompts.tokens[:, 0].tolist()
        self.asked.append((rollout, prompts.index.tolist(), numbers))
        self.spent = False
        rows = [[number, *[7] * (1 + number % 3)] for number in numbers]
        sequences = Sequences.pad(rows, [[False, *[True] * (len(row) - 1)] for row in rows])
        # Values that tell the rollout, the stream index and the sample apart.
        mark = (100.0 * rollout + prompts.index + prompts.sample / 10)[:, None].expand(sequences.tokens.shape)
        marked: list[Tensor] = [mark + i for i in range(6)]
        return ExperienceBatch(sequences, *marked, 0.2, prompts.micro_batch_tokens)


def asks(items: list[tuple[int, int, int]]) -> PromptBatch:
    return PromptBatch(
        Sequences.pad([[number] for number, _, _ in items], [[False] for _ in items]),
        torch.tensor([index for _, index, _ in items]),
        torch.tensor([sample for _, _, sample in items]),
        tuple(str(number) for number, _, _ in items),
        tuple({"number": number} for number, _, _ in items),
        50,
    )


def rollouts(
    policy: Policy, rank: int = 0, world: int = 1, prompts: int = 10, samples: int = 2, epochs: int = 3
) -> RolloutLoader:
    """Rollouts of 4 prompts, answered ``samples`` times each, in minibatches of 2."""
    return RolloutLoader(list(range(prompts)), asks, policy, lambda: policy.spent, 4, samples, 2, epochs, rank, world)


def mark_of(batch: ExperienceBatch) -> list[float]:
    return [round(row[0], 3) for row in batch.sampled_logprobs.tolist()]


def test_sizes() -> None:
    made = rollouts(Policy())
    assert made.episodes_per_rollout == 8
    assert made.steps_per_rollout == 3 * 4
    assert len(made) == 3 * 12, "ten prompts are three rollouts of four, rounded up"


def test_nothing_is_collected_before_a_minibatch_is_asked_for() -> None:
    policy = Policy()
    stream = iter(rollouts(policy))
    assert policy.asked == []
    for step in range(1, 37):
        next(stream)
        assert len(policy.asked) == 1 + (step - 1) // 12, "a rollout is collected with its first step, not before"
    assert [rollout for rollout, _, _ in policy.asked] == [0, 1, 2]


def test_every_episode_is_used_once_in_each_pass() -> None:
    policy = Policy()
    batches = [mark_of(batch) for batch in rollouts(policy)]
    assert [len(batch) for batch in batches] == [2] * 36
    for rollout in range(3):
        steps = batches[12 * rollout : 12 * (rollout + 1)]
        passes = [[mark for batch in steps[4 * i : 4 * (i + 1)] for mark in batch] for i in range(3)]
        index = range(4 * rollout, 4 * (rollout + 1))
        episodes = sorted(100.0 * rollout + i + sample / 10 for i in index for sample in range(2))
        assert all(sorted(one) == pytest.approx(episodes) for one in passes)
        assert len({tuple(one) for one in passes}) == 3, "each pass has an order of its own"


def test_prompts_are_a_stream_of_passes() -> None:
    """The tenth prompt is followed by the first of the next pass, within one rollout."""
    policy = Policy()
    made = rollouts(policy, samples=1)
    stream = iter(made)
    for _ in range(5 * made.steps_per_rollout - len(made)):
        next(stream)
    for _ in made:
        pass
    used = [number for _, _, numbers in policy.asked for number in numbers]
    assert len(policy.asked) == 5
    assert sorted(used[:10]) == sorted(used[10:20]) == list(range(10))
    assert used[:10] != used[10:20]
    assert [i for _, index, _ in policy.asked for i in index] == list(range(20)), "the noise is keyed by the stream"


@pytest.mark.parametrize("step", [1, 7, 12, 17, 24])
def test_state_brings_the_buffer_back(step: int) -> None:
    """Through a file, read without unpickling code, as Lightning reads a checkpoint."""
    whole = list(rollouts(Policy()))
    broken = rollouts(Policy())
    stream = iter(broken)
    for _ in range(step):
        next(stream)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)

    policy = Policy()
    resumed = rollouts(policy)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = list(islice(resumed, 36 - step))  # Lightning asks for what is left of its pass
    assert [rollout for rollout, _, _ in policy.asked] == [r for r in range(3) if r * 12 >= step], (
        "no rollout is redone"
    )
    for a, b in zip(rest, whole[step:], strict=True):
        assert a.micro_batch_tokens == b.micro_batch_tokens
        for name in ("old_logprobs", "values", "advantages", "returns"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "lengths", "mask"):
            assert torch.equal(getattr(a.sequences, name), getattr(b.sequences, name))


def test_a_spent_buffer_is_not_saved() -> None:
    made = rollouts(Policy())
    stream = iter(made)
    for _ in range(12):
        next(stream)
    assert made.state_dict() == {"rollout": 1, "step": 0, "buffer": None}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_prompts_and_minibatches(world: int) -> None:
    alone = Policy()
    whole = [mark_of(batch) for batch in rollouts(alone)]
    policies = [Policy() for _ in range(world)]
    shares = [
        [mark_of(batch) for batch in rollouts(policy, rank, world)] for rank, policy in enumerate(policies)
    ]  # fmt: skip
    for step, batch in enumerate(whole):
        assert Counter(mark for share in shares for mark in share[step]) == Counter(batch)
    for rollout, index, _ in alone.asked:
        assert sorted(i for policy in policies for i in policy.asked[rollout][1]) == sorted(index)


# --- a rollout cut short ---------------------------------------------------------------------------------------------


def test_the_rest_of_a_spent_rollout_is_passed_over() -> None:
    policy = Policy()
    stream = iter(rollouts(policy))
    taken = [mark_of(next(stream)) for _ in range(3)]
    policy.spent = True
    taken += [mark_of(next(stream)) for _ in range(12)]
    assert [rollout for rollout, _, _ in policy.asked] == [0, 1]
    assert [int(marks[0] // 100) for marks in taken] == [0] * 3 + [1] * 12
    whole = [mark_of(batch) for batch in rollouts(Policy())]
    assert taken[3:] == whole[12:24], "the next rollout is what it would have been"


def test_spent_by_its_last_step_is_spent_once() -> None:
    policy = Policy()
    stream = iter(rollouts(policy))
    for _ in range(12):
        next(stream)
    policy.spent = True
    next(stream)
    assert [rollout for rollout, _, _ in policy.asked] == [0, 1]


def test_a_pass_keeps_its_number_of_steps() -> None:
    """Steps are what a run is counted in; rollouts that are cut short only make it sample more."""
    policy = Policy()
    steps = 0
    for _ in rollouts(policy):
        steps += 1
        policy.spent = steps % 5 == 0
    assert steps == 36
    assert len(policy.asked) == 8, "of 5 steps each, the last of 1"


def test_a_rollout_that_was_spent_stays_so_after_loading() -> None:
    policy = Policy()
    broken = rollouts(policy)
    stream = iter(broken)
    for _ in range(3):
        next(stream)
    again = Policy()
    resumed = rollouts(again)
    resumed.load_state_dict(broken.state_dict())
    policy.spent = again.spent = True  # the module's own state, which its checkpoint holds
    assert mark_of(next(iter(resumed))) == mark_of(next(stream))
    assert again.asked == policy.asked[1:]


def changed(policy: Policy, **settings: int) -> RolloutLoader:
    """The loader of a run that is continued with other settings than ``rollouts`` has."""
    sizes = {"rollout_size": 4, "samples_per_prompt": 2, "minibatch_size": 2, "ppo_epochs": 3, **settings}
    budget = sizes.pop("micro_batch_tokens", 50)

    def ask(items: list[tuple[int, int, int]]) -> PromptBatch:
        return replace(asks(items), micro_batch_tokens=budget)

    return RolloutLoader(list(range(10)), ask, policy, lambda: policy.spent, **sizes)


def saved_after(step: int) -> dict[str, Any]:
    broken = rollouts(Policy())
    stream = iter(broken)
    for _ in range(step):
        next(stream)
    return broken.state_dict()


def test_a_resumed_rollout_goes_through_in_the_micro_batches_of_the_run_that_continues() -> None:
    """Lowering them is what one does when memory ran out on this very rollout."""
    policy = Policy()
    resumed = changed(policy, micro_batch_tokens=4)
    resumed.load_state_dict(saved_after(5))
    batch = next(iter(resumed))
    assert not policy.asked, "no rollout is redone"
    assert batch.micro_batch_tokens == 4


@pytest.mark.parametrize(
    "settings",
    [{"ppo_epochs": 1}, {"minibatch_size": 8}, {"rollout_size": 2}, {"rollout_size": 6}, {"samples_per_prompt": 3}],
    ids=str,
)
def test_a_rollout_that_no_longer_fits_the_settings_is_passed_over(settings: dict[str, int]) -> None:
    """Twelve steps were to be made on each rollout, and five are."""
    policy = Policy()
    resumed = changed(policy, **settings)
    resumed.load_state_dict(saved_after(5))
    stream = iter(resumed)
    for _ in range(resumed.steps_per_rollout + 1):
        next(stream)
    assert [rollout for rollout, _, _ in policy.asked] == [1, 2]


# --- ranks -----------------------------------------------------------------------------------------------------------


class Ranks:
    """Loaders that stand for the ranks of a run, in threads where they talk to each other."""

    def __init__(self, patch: pytest.MonkeyPatch, world: int, samples: int = 2) -> None:
        self.world = world
        self.policies = [Policy() for _ in range(world)]
        self.loaders = [rollouts(policy, rank, world, samples=samples) for rank, policy in enumerate(self.policies)]
        self.streams = [iter(loader) for loader in self.loaders]
        self._patch = patch

    def step(self) -> list[list[float]]:
        """What each rank is handed."""
        return [mark_of(next(stream)) for stream in self.streams]

    def states(self) -> list[dict[str, Any]]:
        """What each rank would save."""
        slots: list[Any] = [None] * self.world
        barrier = threading.Barrier(self.world, timeout=60)
        here = threading.local()

        def all_gather_object(parts: list[Any], own: Any) -> None:
            slots[here.rank] = own
            barrier.wait()
            parts[:] = slots

        def state(rank: int) -> dict[str, Any]:
            here.rank = rank
            return self.loaders[rank].state_dict()

        self._patch.setattr(torch.distributed, "all_gather_object", all_gather_object)
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(state, range(self.world)))

    def load(self, state: dict[str, Any]) -> None:
        for loader in self.loaders:
            loader.load_state_dict(state)


def flat(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A saved buffer's rows, each up to its length."""
    buffer = state["buffer"]
    columns = [buffer["sequences"][name] for name in ("tokens", "mask")]
    columns += [buffer[name] for name in ("sampled_logprobs", "old_logprobs", "values", "advantages", "returns")]
    lengths = buffer["sequences"]["lengths"].tolist()
    return [tuple(tuple(column[row, :length].tolist()) for column in columns) for row, length in enumerate(lengths)]


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_the_saved_buffer_is_that_of_one_process(seed: pytest.MonkeyPatch, world: int, samples: int) -> None:
    """Four prompts: two for each of two ranks, two, one and one for three."""
    alone, ranks = Ranks(seed, 1, samples), Ranks(seed, world, samples)
    for _ in range(2):
        alone.step()
        ranks.step()
    (expected,) = alone.states()
    found = ranks.states()
    assert len(flat(expected)) == 4 * samples
    for state in found:
        assert (state["rollout"], state["step"]) == (0, 2)
        assert flat(state) == flat(expected)
        assert state["buffer"]["kl_coefficient"] == 0.2


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("step", [5, 12, 13])
def test_resumed_by_another_number_of_ranks(seed: pytest.MonkeyPatch, before: int, after: int, step: int) -> None:
    whole = [mark_of(batch) for batch in rollouts(Policy())]
    broken, resumed = Ranks(seed, before), Ranks(seed, after)
    for _ in range(step):
        broken.step()
    file = io.BytesIO()
    torch.save(broken.states()[0], file)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    for expected in whole[step:]:
        assert Counter(mark for share in resumed.step() for mark in share) == Counter(expected)
    first = 0 if step < 12 else 1
    for policy in resumed.policies:
        assert [rollout for rollout, _, _ in policy.asked] == [r for r in range(first, 3) if r * 12 >= step]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_responses_to_one_prompt_stay_on_one_rank(seed: pytest.MonkeyPatch, world: int) -> None:
    """Also after loading: what compares them finds them together."""
    ranks = Ranks(seed, 2, samples=3)
    ranks.step()
    (state, _) = ranks.states()
    loaded = Ranks(seed, world, samples=3)
    loaded.load(state)
    found: list[int] = []
    for loader in loaded.loaders:
        assert loader.buffer is not None
        groups = Counter(int(mark) for mark in mark_of(loader.buffer))
        assert set(groups.values()) == {3}
        found.extend(groups)
    assert sorted(found) == [0, 1, 2, 3]


def test_a_rollout_has_a_prompt_for_each_rank() -> None:
    with pytest.raises(UserError, match=r"data\.rollout_size: 4 prompts are too few for 5 ranks"):
        rollouts(Policy(), rank=4, world=5)


def test_a_limit_on_the_batches_passes_over_no_row_in_training_and_keeps_to_the_first_rows_in_evaluation() -> None:
    """Lightning leaves a loader after so many batches, and asks it for the next epoch's."""

    def collate(rows: list[int]) -> Any:
        return rows

    def four(loader: BatchLoader) -> list[Any]:
        return list(islice(loader, 4))

    training, evaluation = (BatchLoader(range(10), 2, collate, order) for order in (shuffled(10), None))
    seen = [batch for _ in range(5) for batch in four(training)]
    assert [len(batch) for batch in seen] == [2] * 20, "no epoch is cut short by the end of the rows"
    for epoch in range(4):
        assert sorted(row for batch in seen[5 * epoch : 5 * epoch + 5] for row in batch) == list(range(10))
    assert four(evaluation) == four(evaluation) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(list(evaluation)) == len(list(training)) == 5
