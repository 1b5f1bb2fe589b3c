#pragma once
#include <string>
#include <vector>

namespace kiln::bench {

/// Fraction of the machine's limit at one shape, Kiln's and its peer's.
struct PlotPoint {
  std::string group, label;
  double kiln = 0, peer = 0; ///< 1 is the limit; 0 leaves the bar out
  double reach = 0;          ///< what Kiln has to reach
};

/// Writes a bar chart as SVG; false, with a message on stderr, when the file cannot be written.
bool write_plot(const std::string& path, const std::string& title, const std::vector<PlotPoint>& points);

} // namespace kiln::bench
