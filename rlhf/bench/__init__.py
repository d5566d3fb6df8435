"""What a rollout, a step and an op cost here, beside what others take for the same."""
