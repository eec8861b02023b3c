// Maps cut into boxes of positions.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

struct Box {
  int64_t origin[3];
  int64_t extent[3];
};

struct TilePlan {
  int64_t extent[3];
  int64_t count[3];
  int64_t tiles;
  int64_t staged;  // positions of the largest tile
};

// Tiles of nearly equal size with at most `budget` positions each, wide before high before deep.
DSCONV_INLINE TilePlan plan_tiles(const int64_t (&size)[3], int64_t budget) {
  TilePlan plan{{1, 1, 1}, {}, 1, 1};
  for (int dim = 2; dim >= 0; --dim) {
    const int64_t fit = max64(1, min64(size[dim], budget / plan.staged)), pieces = ceil_div(size[dim], fit);
    plan.extent[dim] = ceil_div(size[dim], pieces);
    plan.count[dim] = ceil_div(size[dim], plan.extent[dim]);
    plan.tiles *= plan.count[dim];
    plan.staged *= plan.extent[dim];
  }
  return plan;
}

DSCONV_INLINE Box tile_box(const TilePlan& plan, const int64_t (&size)[3], int64_t tile) {
  Box box;
  for (int dim = 2; dim >= 0; --dim, tile /= plan.count[dim + 1]) {
    box.origin[dim] = tile % plan.count[dim] * plan.extent[dim];
    box.extent[dim] = min64(plan.extent[dim], size[dim] - box.origin[dim]);
  }
  return box;
}

}  // namespace dsconv::cpu::DSCONV_ISA
