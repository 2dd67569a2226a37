"""The built-in world: small instructions, imperfect demonstrations and an exact reward, from a seed alone.

It needs no file, no network and no GPU, and everything in it is a deterministic function of `World`. The gold reward is
exact, so what RLHF is meant to improve can be measured instead of judged: whether an answer is right, whether it is
brief, and whether what should be declined is declined (and nothing else).
"""

from rlhf_lit.playground.reward import gold_reward, is_right
from rlhf_lit.playground.tokenizer import train_tokenizer, write_model_folder
from rlhf_lit.playground.world import Wanted, World, demonstrations, preference_pairs, prompts, ranked_lists, rows

__all__ = [
    "Wanted",
    "World",
    "demonstrations",
    "gold_reward",
    "is_right",
    "preference_pairs",
    "prompts",
    "ranked_lists",
    "rows",
    "train_tokenizer",
    "write_model_folder",
]
