#define FH_ROWS float
#include "cuda/stream.inc"
