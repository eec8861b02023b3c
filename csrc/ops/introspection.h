// What the library says about itself, and the overrides of its choices.
#pragma once

#include <string>

namespace dsconv {

std::string kernels();
std::string build_info();
void explain_begin();
std::string explain_end();
void set_choices(const std::string& rows);

}  // namespace dsconv
