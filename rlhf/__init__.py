"""RLHF for Hugging Face models: SFT, reward model and PPO."""
