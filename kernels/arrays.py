"""The NumPy arrays that hold weights, KV and hidden states.

They are not torch's tensors, because importing torch costs a process 125 MB and more than a second, and the native
kernels compute without it. Homes that compute in torch wrap these arrays without copying them.
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
"""Hidden states (T, n). Only the home that computes them knows what they are made of."""
