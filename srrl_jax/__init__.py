"""Self-rewarding, rubric-based reinforcement learning for open-ended reasoning, in JAX."""
