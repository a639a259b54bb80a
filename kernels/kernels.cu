// All kernels, one translation unit: one fatbin.
#include "route.cu"

#include "dispatch.cu"

#include "land.cu"

#include "pairs.cu"

#include "flat.cu"

#include "contiguous.cu"

#include "combine.cu"

#include "fifo.cu"

#include "quant.cu"

#include "carried.cu"
#include "posted.cu"

#include "poison.cu"
