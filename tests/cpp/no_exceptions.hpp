// Half of hpp_test that is compiled without exceptions and without RTTI: the two share a2a.hpp's inline functions and types.
#pragma once

#include <a2a.hpp>

namespace without_exceptions {

/** The status that a config is refused with, found without a throw. */
a2a_status_t refused(const a2a::Config &config);

/** A comm whose Result was made here. */
a2a::Result<a2a::Comm> create(const a2a::Config &config);

}  // namespace without_exceptions
