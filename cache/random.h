#pragma once
#include "cache/digest.h"
#include "cache/status.h"

namespace kiln {

/// 32 bytes that nobody can guess, from the system's generator. (libsodium's own would abort the host when there is
/// none.)
Result<Digest> random_digest();

} // namespace kiln
