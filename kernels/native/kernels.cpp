// The kernels of one machine: this file is compiled once per home, with that machine's vector registers.
//
// Every output is computed by the same float operations whatever is computed beside it.
#include "attention.h"
#include "feed_forward.h"

#define NAME_(home) #home
#define NAME(home) NAME_(home)

namespace shoal {
namespace homes {
extern const Home SHOAL_HOME;
const Home SHOAL_HOME = {NAME(SHOAL_HOME), linears, gated, experts, scores, gather_rows, rms_norm, attention};
}  // namespace homes
}  // namespace shoal
