"""The algorithms, and the reward sources their configs name."""

from rlhf_lit.algorithms.dpo import DPO
from rlhf_lit.algorithms.grpo import GRPO
from rlhf_lit.algorithms.ppo import PPO
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.algorithms.rloo import RLOO
from rlhf_lit.algorithms.sft import SFT

__all__ = ["DPO", "GRPO", "PPO", "RLOO", "SFT", "RewardModel"]
