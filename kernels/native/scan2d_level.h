/* The scan for one instruction set, for levels.h. */

#include "scan2d_forward.h"
#include "scan2d_backward.h"
