#define FH_ISA "generic"
#define FH_TABLE fh_cpu_generic
#include "cpu/kernels.inc"
