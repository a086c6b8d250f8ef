"""A pretended GPU: run gndet's CUDA paths on a machine without a GPU, and count what they would cost there.

`gpu.PretendedGPU` is a context in which torch seems to have a GPU.  A tensor is on that GPU if its storage is in the
GPU's `memory`; its values lie on the CPU, and CPU operators compute them.
- A torch function mode answers what Python asks of a tensor: factories with device="cuda" and Tensor.to put their
  result on the GPU, Tensor.device is "cuda:0", tolist() waits for the GPU.
- A torch dispatch mode sees every operator, in backward passes too.  What an operator makes of the GPU's tensors is on
  the GPU.  An operator of tensors on both devices raises Refused.  An operator whose result the host needs (item,
  nonzero, an index of bools) is a wait, as is a copy that blocks; any other operator that computes is a launch.
- Triton's interpreter runs Triton's kernels, and gndet's custom operators run their kernels for CUDA.
- torch.cuda answers for a GPU of `capacity` bytes.  A tensor that does not fit raises torch.OutOfMemoryError.
Launches, waits and peak memory are counted by phase; `at` begins a phase.

Under a FakeTensorMode tensors have no values, so that a step at full size takes seconds.  `fake_cuda` does without
PretendedGPU: its tensors are torch's own fake ones with device "cuda", so that it also tries CUDA's autocast and
layouts; but it cannot run a backward pass, for which autograd asks CUDA for streams.

Neither sees the limits and types of CUDA's kernels, races between streams, or speed.
"""
