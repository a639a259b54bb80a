#include "no_exceptions.hpp"

#include <cstring>

#if A2A_HAS_EXCEPTIONS
#error "compile this with -fno-exceptions"
#endif

namespace without_exceptions {

a2a_status_t refused(const a2a::Config &config)
{
    a2a::Result<a2a::Comm> comm = a2a::Comm::create(config);
    return comm || std::strlen(comm.error().what()) == 0 ? A2A_SUCCESS : comm.status();
}

a2a::Result<a2a::Comm> create(const a2a::Config &config)
{
    auto comm = a2a::Comm::create(config);
    if (!comm) return comm.error();
    auto routing = a2a::Routing::create(*comm);
    if (!routing) return routing.error();
    a2a::DispatchIn nothing;
    if (comm->dispatch(*routing, nothing, nullptr)) return a2a::Error(A2A_INTERNAL, "a dispatch of nothing is accepted");
    return comm;
}

}  // namespace without_exceptions
