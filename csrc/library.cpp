// Registers the operators: schemas from dsconv_ext/schemas.inc, implementations per device.
#include "ops/depthwise.h"
#include "ops/introspection.h"
#include "ops/kept_memory.h"
#include "ops/packed.h"
#include "ops/separable.h"

STABLE_TORCH_LIBRARY(dsconv, library) {
#define DSCONV_OP(schema) library.def(schema);
#include "dsconv_ext/schemas.inc"
#undef DSCONV_OP
}

STABLE_TORCH_LIBRARY_IMPL(dsconv, CPU, library) {
  library.impl("depthwise", TORCH_BOX(&dsconv::depthwise));
  library.impl("depthwise_backward", TORCH_BOX(&dsconv::depthwise_backward));
  library.impl("separable", TORCH_BOX(&dsconv::separable));
  library.impl("separable_backward", TORCH_BOX(&dsconv::separable_backward));
  library.impl("pack", TORCH_BOX(&dsconv::pack));
  library.impl("pack_pointwise", TORCH_BOX(&dsconv::pack_pointwise));
  library.impl("run_packed", TORCH_BOX(&dsconv::run_packed));
}

#if DSCONV_CUDA
// What is not here runs as the composition that Python registers below every kernel.
STABLE_TORCH_LIBRARY_IMPL(dsconv, CUDA, library) {
  library.impl("depthwise", TORCH_BOX(&dsconv::depthwise));
  library.impl("separable", TORCH_BOX(&dsconv::separable));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(dsconv, CompositeExplicitAutograd, library) {
  library.impl("kernels", TORCH_BOX(&dsconv::kernels));
  library.impl("build_info", TORCH_BOX(&dsconv::build_info));
  library.impl("explain_begin", TORCH_BOX(&dsconv::explain_begin));
  library.impl("explain_end", TORCH_BOX(&dsconv::explain_end));
  library.impl("set_choices", TORCH_BOX(&dsconv::set_choices));
  library.impl("empty_cache", TORCH_BOX(&dsconv::empty_cache));
}
