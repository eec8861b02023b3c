// Packed weights: an opaque tensor of bytes that holds a layer's weights in the order the kernels of this machine read
// them. Its header says whose weights they are; operators check it and cache nothing.
#pragma once

#include "ops/common.h"

namespace dsconv {

// Both weights of a layer, or those of a depthwise convolution alone.
Tensor pack(const Tensor& depthwise_weight, const OptionalTensor& pointwise_weight);

// Points problem.packed at the part of `packed` that `row` reads. Weights packed for another target are left alone; those
// of another layer, or bytes that pack() did not write, are an error.
void use_packed(const OptionalTensor& packed, DepthwiseProblem& problem, const Row& row);
void use_packed(const OptionalTensor& packed, PointwiseProblem& problem, const Row& row);
void use_packed(const OptionalTensor& packed, SeparableProblem& problem, const Row& row);

}  // namespace dsconv
