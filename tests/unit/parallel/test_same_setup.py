"""What ranks are compared by."""

from rlhf_lit.parallel.same_setup import difference, facts_of

CONFIG = {
    "name": "ppo",
    "runs": "runs",
    "model": {"class_path": "PPO", "init_args": {"base": {"name": "a"}, "kl": {"init_args": {"beta": 0.1}}}},
    "data": {"init_args": {"cache": "here", "workers": 1}},
}
ROWS = {"train": "9 rows with the digest abc"}


def test_facts_are_the_configuration_the_rows_and_the_versions():
    facts = facts_of(CONFIG, ROWS)
    assert facts["model.kl.beta"] == "0.1"
    assert facts["the data of train"] == ROWS["train"]
    assert facts["the version of torch"]
    assert not {"runs", "data.cache", "data.workers"} & facts.keys(), "a machine's own affair"


def test_equal_ranks_have_no_difference():
    facts = facts_of(CONFIG, ROWS)
    assert difference([facts, dict(facts)]) is None


def test_the_first_difference_is_named_with_both_values():
    facts = facts_of(CONFIG, ROWS)
    other = {**facts, "the version of torch": "1.0", "model.kl.beta": "0.2"}
    assert difference([{**facts, "the version of torch": "2.0"}, facts, other, {**other, "x": "1"}]) is not None
    assert difference([facts, facts, {**facts, "model.kl.beta": "0.2"}]) == (
        "rank 2 is not set up as rank 0 is: model.kl.beta is 0.2 there and 0.1 on rank 0 (1 of 3 ranks differ from "
        "rank 0)"
    )
    assert "x is 1 there and not there on rank 0" in str(difference([facts, {**facts, "x": "1"}]))
