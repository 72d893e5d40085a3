// Runs the entropy kernel of the default instruction set and compares it with double arithmetic. tests/test_aarch64.py
// compiles this for aarch64, whose fused multiply-adds change the rounding of every product that a sum follows.
#include "cpu/entropy.h"

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  using namespace blt;
  constexpr int64_t kRows = 20, kVocab = 261;  // no whole number of registers
  std::vector<float> logits(kRows * kVocab), entropies(kRows);
  uint32_t state = 1;
  for (float& x : logits) {
    state = state * 1664525u + 1013904223u;
    x = float(state >> 16) / 4096.0f - 8.0f;
    x = state % 7 == 0 ? -INFINITY : x;
  }
  cpu::cpu_default::entropy({DType::f32, kVocab, logits.data(), entropies.data()}, 0, kRows);
  int wrong = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    const float* x = &logits[size_t(r * kVocab)];
    double max = -INFINITY, sum = 0, dot = 0;
    for (int64_t i = 0; i < kVocab; ++i) max = std::fmax(max, x[i]);
    for (int64_t i = 0; i < kVocab; ++i) {
      const double power = std::exp(x[i] - max);
      sum += power;
      dot += power > 0 ? power * (x[i] - max) : 0;
    }
    const double expected = std::log(sum) - dot / sum;
    if (!(std::fabs(entropies[size_t(r)] - expected) < 1e-5)) {  // NaN is wrong, too
      std::printf("row %d: expected %.7g, got %.7g\n", int(r), expected, double(entropies[size_t(r)]));
      ++wrong;
    }
  }
  return wrong;
}
