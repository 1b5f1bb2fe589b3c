#pragma once
#include <exception>
#include <new>

#include "api/kiln.h"
#include "cache/status.h"

namespace kiln {

/// The status as the C API's; keeps its message for kiln_last_error().
kiln_status report(const Status& status);
/// Likewise, of an exception that ends at the C boundary.
kiln_status report_exception(const char* what, kiln_status status);

/// The body of a C function: no exception leaves it.
template <class Body> kiln_status guarded(Body body) noexcept {
  try {
    return report(body());
  } catch (const std::bad_alloc&) {
    return report_exception("out of memory", KILN_OUT_OF_MEMORY);
  } catch (const std::exception& e) {
    return report_exception(e.what(), KILN_INTERNAL);
  }
}

} // namespace kiln
