#pragma once
#include <cstdio>
#include <string>
#include <vector>

namespace kiln::bench {

/// One figure and what it has to reach.
struct Figure {
  std::string group, what;
  double measured = 0;
  std::string unit; ///< "" for a ratio
  enum class Bound { at_least, at_most, none } bound = Bound::none;
  double reach = 0;
  std::string detail; ///< the rates behind the figure

  bool met() const;
};

/// Figures as a table, printed row by row while they come, and as one JSON object.
class Report {
public:
  /// Prints the machine: CPU, cores, clock (`clock_hz`, from the dependent chain).
  explicit Report(double clock_hz);

  void add(Figure figure);
  bool all_met() const;
  /// `{machine: {…}, figures: [{group, what, measured, unit, bound, reach, met, detail}]}`; false, with a message on
  /// stderr, when the file cannot be written.
  bool write_json(const std::string& path) const;

  const std::string& machine() const { return machine_; }

private:
  std::string machine_;
  double clock_hz_;
  std::vector<Figure> figures_;
  std::string last_group_;
};

} // namespace kiln::bench
