"""A GPU-free rig: the unmodified Python of vLLM's official wheel, run on a CPU.

The wheel's native code is for CUDA and cannot be loaded, and its Triton kernels want a GPU. Three things mend
that:

- `platform`: a platform plugin (``vllm.platform_plugins``) that says "this is a CPU", and a stand-in for
  Triton's missing CPU driver, so that its interpreter runs the kernels.
- `ops`: the six native operations that a dense model on vLLM's CPU backend calls, in plain torch.
- `environment`: the settings; they must stand before vllm is imported.

Two more are there for the tests: `block_tables` puts plain torch in the place of two kernels that take half
of a step when they are interpreted, and `kernels` lets the interpreter run the linear-attention kernels.

The folder above this package is what goes on the module path: the ``dist-info`` folder beside it declares the
entry points, as a real installation would. Needs the packages listed in ``requirements.txt`` beside the
folder; torchvision must not be installed.
"""
