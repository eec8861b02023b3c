// Argument checks of the operators: every message names the argument, what came and what is wanted.
#pragma once

#include <torch/headeronly/util/Exception.h>

// DSCONV_CHECK(condition, argument, got, wanted)
#define DSCONV_CHECK(condition, argument, got, ...) \
  STD_TORCH_CHECK(condition, argument, ": got ", got, ", expected ", __VA_ARGS__)
