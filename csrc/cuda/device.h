// What the operators need to know of a CUDA device, and the check of a launch.
#pragma once

#include "choose.h"

namespace dsconv::cuda {

// The device as choose.h wants it. sm is 0 where this library holds no code for it.
const Machine& machine(int device);

// Throws std::runtime_error naming the kernel when the launch before it failed.
void check_launch(const char* kernel);

}  // namespace dsconv::cuda
