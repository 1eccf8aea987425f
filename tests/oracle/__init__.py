"""Parity with PyTorch: the reference's own draws replayed through our loop. Torch-free parts also serve the goldens."""

import os

# On GPUs MLX may multiply float32 matrices in TF32, which keeps 10 bits. Read at the first matmul of the process.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
