#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "export.h"
#include "planted_bugs.h"

namespace he::cuda {

void expect_equal(const std::vector<float>& found, const std::vector<float>& expected,
                  float tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::fabs(found[i] - expected[i]) <= tolerance) continue;
    char text[96];
    std::snprintf(text, sizeof(text), "wrong answer: element %zu is %g, expected %g", i, found[i],
                  expected[i]);
    throw std::runtime_error(text);
  }
}

std::string run_planted_bug(const std::string& name, bool broken) {
  std::vector<PlantedBug> bugs = kernel_bugs();
  for (const PlantedBug& bug : pipeline_bugs()) bugs.push_back(bug);
  for (const PlantedBug& bug : bugs) {
    if (name != bug.name) continue;
    try {
      bug.run(broken);
      return "";
    } catch (const std::runtime_error& noticed) {
      return noticed.what();
    }
  }
  throw std::invalid_argument("no planted bug is called " + name);
}

}  // namespace he::cuda

// Writes what was noticed to `message`, cut to its capacity.
extern "C" HE_EXPORT void planted_bug(const char* name, int broken, char* message, int capacity) {
  const std::string noticed = he::cuda::run_planted_bug(name, broken != 0);
  std::snprintf(message, capacity, "%s", noticed.c_str());
}
