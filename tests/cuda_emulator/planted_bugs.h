// Kernels with a planted mistake, each beside a twin without it.
#pragma once

#include <string>
#include <vector>

namespace he::cuda {

struct PlantedBug {
  const char* name;
  // Launches the broken kernel or its clean twin on a fixed input and checks what it wrote. Throws
  // std::runtime_error when the launch fails or the answer is wrong.
  void (*run)(bool broken);
};

// Throws, naming the first value that differs by more than `tolerance`; a NaN always does.
void expect_equal(const std::vector<float>& found, const std::vector<float>& expected,
                  float tolerance = 0.f);

std::vector<PlantedBug> kernel_bugs();    // planted_bugs.cu
std::vector<PlantedBug> pipeline_bugs();  // planted_pipeline_bugs.cu

// Runs the bug of that name; returns "" when the answer is right, else what was noticed.
std::string run_planted_bug(const std::string& name, bool broken);

}  // namespace he::cuda
