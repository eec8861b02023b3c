// Work cut into tasks, and the threads it is worth.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

constexpr int64_t kTaskFlops = 1 << 20;  // about 20 us of work: less is not worth a thread

// Of so many threads, those that the work is worth.
DSCONV_INLINE int64_t thread_slots(int64_t threads, int64_t tasks, int64_t flops) {
  return max64(1, min64(min64(threads, tasks), flops / kTaskFlops));
}
// As many tasks as threads may want: by the work alone, where the results depend on how it is cut.
DSCONV_INLINE int64_t wanted_tasks(int64_t flops, int64_t most) { return min64(most, flops / kTaskFlops); }
DSCONV_INLINE int64_t depthwise_flops(const DepthwiseProblem& p) {
  return 2 * numel(p.batch, p.channels * p.multiplier, p.window.out) * product(p.window.taps);
}

// Runs body(first_task, last_task, slot) on `slots` slots of equal size; slot numbers index per-thread scratch.
template <class Body>
DSCONV_INLINE void for_slots(const Runtime& runtime, int64_t tasks, int64_t slots, Body& body) {
  struct Context {
    Body* body;
    int64_t tasks, slots;
  } context{&body, tasks, slots};
  auto trampoline = [](void* p, int64_t slot) {
    const Context& c = *static_cast<Context*>(p);
    (*c.body)(c.tasks* slot / c.slots, c.tasks * (slot + 1) / c.slots, slot);
  };
  if (slots == 1) return body(0, tasks, 0);
  runtime.parallel(slots, trampoline, &context);
}

}  // namespace dsconv::cpu::DSCONV_ISA
