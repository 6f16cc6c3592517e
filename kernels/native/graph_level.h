/* The steps of the graph for one instruction set, for levels.h. */

#include "graph_product.h"
#include "graph_depthwise.h"
#include "graph_norm.h"

#define KERNELS NAME(kernels)
static const struct step_kernels KERNELS = {
    .work = {
        [PIXELS] = NAME(pixels),
        [PRODUCT] = NAME(product),
        [CONVOLUTION] = NAME(convolution),
        [DEPTHWISE] = NAME(depthwise),
        [LAYER_NORM] = NAME(layer_norm),
        [MERGE_NORM] = NAME(merge_norm),
        [GROUP_SCAN] = NAME(group_scan),
        [GATE] = NAME(gate),
        [RECOMBINE] = NAME(recombine),
        [INTERACT] = NAME(interact),
        [ATTENTION] = NAME(attention),
        [MEAN] = NAME(mean),
        [INTERLEAVE] = NAME(interleave),
    },
};
#undef KERNELS
