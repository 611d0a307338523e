"""Compile every kernel call of the package ahead of time, without a GPU, and reject those that would be slow or wrong.

`python -m csrc_triton.tools.aot` plans the forward pass and the neuron statistics on meta tensors, for every chip,
hidden size, intermediate size and number of tokens that is shipped, compiles each distinct kernel with the installed
Triton (its own binder decides signature and specialisation, as at a launch), reads the PTX and the disassembly, prints
a table and exits with 1 if a row fails. Rows fail on

* a spill: stack memory, or a load or store of local memory;
* more shared memory than a program may use on the chip;
* a weight load under 16 bytes. A weight is an argument of at least H * I elements, whatever its name. Which argument a
  load belongs to is followed through the PTX, from the kernel's parameters along the address arithmetic. A narrow load
  of unknown origin counts as a weight load, and a weight without any access must have been missed by this reader: both
  fail;
* a `tl.dot` without matrix instructions (float32 in full precision cannot use them, and passes): HGMMA on sm_90,
  tcgen05 or HMMA on sm_100 and sm_120, HMMA below;
* wgmma with its A operand in registers, which ptxas 12 is known to corrupt.

The facts read from a compilation are cached on disk, so a second run only repeats the planning.
"""
