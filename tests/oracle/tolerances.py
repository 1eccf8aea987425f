"""Every tolerance of the parity tests, with the worst difference seen when it was set.

Integers (tokens, accepted positions, argmax, step counts) have no tolerance: they are equal.
Measured on Linux x86-64, 2 CPU cores, torch 2.13.0, transformers 5.23.0, mlx 0.32.4, float32.
`python -m pytest -m oracle -s` prints the differences of the machine it runs on, in lines that begin with "worst".
"""

# Largest difference over largest absolute value of the reference, in one forward pass.
HIDDEN = 1e-5  # 8.8e-7 (prompt of 1,100 tokens)
KEYS_VALUES = 5e-5  # 7.2e-6 (same prompt; 2.1e-6 in short ones)
LOGITS = 1e-5  # 1.7e-6
IMAGE_KEYS_VALUES = 1e-5  # 1.4e-6; prompts with images, in chunks of 1 to 2,048 tokens
IMAGE_LOGITS = 1e-5  # 1.8e-6 (the same)
SOFT_TOKENS = 1e-5  # 1.2e-6 (heads of 64, and of 72 standardised), vision tower and projector alike

# Mean entropy of a canvas in nats, absolute, at any step of a whole run.
MEAN_ENTROPY = 1e-4  # 3.5e-5

# Shares of positions on which bfloat16 (the reference) and float32 (ours) agree, at least; see test_bfloat16.py.
BFLOAT16_ARGMAX = 0.85  # 95.4 % on random models, 99.6 % on tiny
BFLOAT16_ACCEPTED = 0.85  # 93.2 % on random models, 99.4 % on tiny

# Log-probability of a token in nats, absolute, at any step of a whole run, and by the encoder role.
LOGPROBS = 1e-4
