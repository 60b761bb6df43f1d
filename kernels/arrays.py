"""What weights, KV and hidden states are held in: NumPy arrays.

Not torch's tensors: importing torch costs a process 125 MB and more than a second, and the native kernels compute
without it. The homes that compute in torch wrap these arrays, which copies nothing.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]
FLOAT32 = np.dtype(np.float32)

Hidden = Any
"""Hidden states (T, n) in the home that computes them, which alone knows what they are made of."""
