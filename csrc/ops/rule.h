// Reads the arguments `rule` and `delta` of the ops that segment by entropies, for every device.
#pragma once

#include <optional>
#include <string>

#include "common/check.h"
#include "common/rule.h"

namespace blt {

inline Rule parse_rule(const char* op, const std::string& rule) {
  if (rule == "threshold") return Rule::threshold;
  if (rule == "monotonic") return Rule::monotonic;
  if (rule == "combined") return Rule::combined;
  fail(op, ": rule: expected threshold, monotonic or combined, got ", rule);
}

// The rule, after a check that there is a delta where it needs one.
inline Rule parse_rule(const char* op, const std::string& rule, const std::optional<double>& delta) {
  const Rule parsed = parse_rule(op, rule);
  BLT_CHECK(delta.has_value() == (parsed == Rule::combined), op,
            ": delta: expected one with rule combined, and only then");
  return parsed;
}

}  // namespace blt
