#include "bench/plot.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

#include <fmt/format.h>

namespace kiln::bench {
namespace {

constexpr int kLeft = 240, kWidth = 520, kRight = 70, kRow = 26, kBar = 9, kTop = 74, kBottom = 34;
constexpr double kScale =
    1.2; ///< of the axis: some kernels beat a limit that was measured by reading from a farther cache
constexpr std::string_view kKilnColour = "#1f6f8b", kPeerColour = "#c9a227", kReachColour = "#b22222";

int x_of(double fraction) {
  return kLeft + static_cast<int>(std::clamp(fraction, 0.0, kScale) / kScale * kWidth);
}

std::string text(int x, int y, std::string_view anchor, std::string_view content) {
  return fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"{}\">{}</text>\n", x, y, anchor, content);
}

std::string bar(int y, double fraction, std::string_view colour) {
  return fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>\n", kLeft, y,
                     x_of(fraction) - kLeft, kBar, colour);
}

std::string vertical(int x, int y0, int y1, std::string_view colour) {
  return fmt::format("<line x1=\"{0}\" x2=\"{0}\" y1=\"{1}\" y2=\"{2}\" stroke=\"{3}\"/>\n", x, y0, y1, colour);
}

std::string legend(bool with_peer) {
  int x = kLeft;
  std::string out;
  for (const auto& [colour, name] :
       {std::pair{kKilnColour, "Kiln"}, {kPeerColour, "oneDNN"}, {kReachColour, "to reach"}}) {
    if (colour == kPeerColour && !with_peer)
      continue;
    out += fmt::format("<rect x=\"{}\" y=\"36\" width=\"12\" height=\"9\" fill=\"{}\"/>\n", x, colour) +
           text(x + 18, 45, "start", name);
    x += 100;
  }
  return out;
}

} // namespace

bool write_plot(const std::string& path, const std::string& title, const std::vector<PlotPoint>& points) {
  const int bottom = kTop + static_cast<int>(points.size()) * kRow;
  std::string svg =
      fmt::format("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" font-family=\"sans-serif\" "
                  "font-size=\"11\">\n<rect width=\"{0}\" height=\"{1}\" fill=\"white\"/>\n",
                  kLeft + kWidth + kRight, bottom + kBottom);
  svg += text(12, 20, "start", title);
  svg += legend(std::any_of(points.begin(), points.end(), [](const PlotPoint& point) { return point.peer > 0; }));
  for (int tenth = 0; tenth <= 12; tenth += 2) {
    svg += vertical(x_of(tenth / 10.0), kTop - 4, bottom, tenth == 10 ? "#222222" : "#dddddd");
    svg += text(x_of(tenth / 10.0), bottom + 16, "middle", fmt::format("{:.1f}", tenth / 10.0));
  }
  int y = kTop;
  for (const PlotPoint& point : points) {
    svg += text(kLeft - 8, y + 13, "end", fmt::format("{}: {}", point.group, point.label));
    svg += bar(y + 2, point.kiln, kKilnColour) +
           text(x_of(std::max(point.kiln, point.peer)) + 4, y + 13, "start", fmt::format("{:.2f}", point.kiln));
    if (point.peer > 0)
      svg += bar(y + 2 + kBar, point.peer, kPeerColour);
    if (point.reach > 0)
      svg += vertical(x_of(point.reach), y, y + kRow - 4, kReachColour);
    y += kRow;
  }
  svg += "</svg>\n";
  std::ofstream file(path);
  file << svg;
  file.close();
  if (!file)
    fmt::print(stderr, "bench: cannot write {}\n", path);
  return static_cast<bool>(file);
}

} // namespace kiln::bench
