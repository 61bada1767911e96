#define FH_ROWS __half
#include "cuda/stream.inc"
