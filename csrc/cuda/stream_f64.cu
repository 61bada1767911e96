#define FH_ROWS double
#include "cuda/stream.inc"
