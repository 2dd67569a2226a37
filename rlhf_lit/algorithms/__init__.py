"""The four algorithms."""

from rlhf_lit.algorithms.dpo import DPO
from rlhf_lit.algorithms.ppo import PPO
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.algorithms.sft import SFT

__all__ = ["DPO", "PPO", "SFT", "RewardModel"]
