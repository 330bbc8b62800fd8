"""An epoch of a recipe at its real shapes, on a CUDA device that stores and computes nothing.

`python -m tests.fake_cuda RECIPE` runs the real Trainer. Tensors on the device are torch's fake tensors: they have a
shape, a number format and a device, but no values. What the processor computes itself, such as random numbers by
address, stays real. The command finds mixed devices, mixed number formats in matrix products, synchronisations and
float32 products in inner loops, and tracks the device's memory operation by operation.
"""
