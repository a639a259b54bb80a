// What fragments of C++ in the pages use. They are compiled, not run.
#include <a2a.hpp>
#include <cstdio>

void fragment(a2a::Config config, a2a::Comm comm, a2a::Routing routing, a2a::DispatchIn in, a2a::DispatchOut out, void *stream)
{
    { FRAGMENT }
}
