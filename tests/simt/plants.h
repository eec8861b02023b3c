// Kernels with one bug each, and the same kernel without: each build of the harness must notice its own.
#pragma once

#include <string>

namespace dsconv::simt_test {

// Prints what the kernel did, counts included; 0 unless something was noticed.
int run_plant(const std::string& name);

}  // namespace dsconv::simt_test
