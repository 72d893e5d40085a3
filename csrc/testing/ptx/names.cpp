#include "testing/ptx/names.h"

#include <cctype>
#include <cstdlib>

namespace blt::ptx {

int bytes_of_type(const std::string& type) {
  if (type == "pred") return 0;
  const size_t digits = type.find_first_of("0123456789");
  const int bits = digits == std::string::npos ? 0 : atoi(type.c_str() + digits);
  const int elements = type.ends_with("x2") ? 2 : 1;
  BLT_CHECK(bits == 8 || bits == 16 || bits == 32 || bits == 64, "unknown type ", type);
  return bits / 8 * elements;
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    depth += text[i] == '{' || text[i] == '[';
    depth -= text[i] == '}' || text[i] == ']';
    if (text[i] == separator && depth == 0) {
      parts.push_back(trimmed(text.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  const std::string last = trimmed(text.substr(begin));
  if (!last.empty()) parts.push_back(last);
  return parts;
}

void Names::declare_registers(const std::string& type, const std::vector<std::string>& names) {
  const int width = bytes_of_type(type);
  for (const std::string& name : names) {
    const size_t bracket = name.find('<');
    const size_t count = bracket == std::string::npos ? 1 : size_t(atoi(name.c_str() + bracket + 1));
    scopes_.back()[name.substr(0, bracket)] = {width, std::vector<Operand>(count)};
  }
}

Operand* Names::find(const std::string& name) {
  // First the whole name, then a prefix and a number.
  const size_t stem = name.find_last_not_of("0123456789") + 1;
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    auto found = scope->find(name);
    size_t index = 0;
    if (found == scope->end() && stem < name.size()) {
      found = scope->find(name.substr(0, stem));
      index = size_t(atoi(name.c_str() + stem));
    }
    if (found != scope->end() && index < found->second.places.size()) {
      Operand& place = found->second.places[index];
      if (!place.exists()) place = allocate(found->second.width);
      return &place;
    }
  }
  return nullptr;
}

Operand Names::allocate(int width) {
  constexpr int64_t kAlign = 64;
  const Operand place{int32_t(kernel_.register_bytes), width};
  const int64_t bytes = width == 0 ? int64_t(sizeof(Mask)) : int64_t(kLanes) * width;
  kernel_.register_bytes += (bytes + kAlign - 1) / kAlign * kAlign;
  return place;
}

Operand Names::destination(const std::string& name) {
  const Operand* place = find(name);
  BLT_CHECK(place != nullptr, "unknown register ", name);
  return *place;
}

Operand Names::constant(uint64_t bits, int width) {
  if (width == 0) {
    bits = bits != 0 ? kAllLanes : 0;
  } else if (width < 8) {
    bits &= (uint64_t(1) << (8 * width)) - 1;
  }
  Operand& place = constants_[{bits, width}];
  if (!place.exists()) {
    place = allocate(width);
    kernel_.constants.push_back({place, bits});
  }
  return place;
}

Operand Names::special(const std::string& name, int width) {
  struct Special {
    const char* name;
    Operand* place;
  };
  for (const Special& entry :
       {Special{"%tid.x", &kernel_.thread}, Special{"%ctaid.x", &kernel_.block}, Special{"%ntid.x", &kernel_.threads},
        Special{"%nctaid.x", &kernel_.blocks}, Special{"%laneid", &kernel_.lane}}) {
    if (name == entry.name) {
      BLT_CHECK(width == 4, name, " has 4 bytes, not ", width);
      if (!entry.place->exists()) *entry.place = allocate(4);
      return *entry.place;
    }
  }
  // Grids and blocks have one dimension.
  if (name == "%tid.y" || name == "%tid.z" || name == "%ctaid.y" || name == "%ctaid.z") return constant(0, width);
  if (name == "%ntid.y" || name == "%ntid.z" || name == "%nctaid.y" || name == "%nctaid.z") return constant(1, width);
  fail("unknown register ", name);
}

Operand Names::source(const std::string& text, int width) {
  if (const Operand* place = find(text)) return *place;
  if (text.starts_with('%')) return special(text, width);
  if (const auto symbol = symbols_.find(text); symbol != symbols_.end()) {
    return constant(uint64_t(symbol->second), width);
  }
  const bool is_float = text.size() > 2 && text[0] == '0' && std::string("fFdD").find(text[1]) != std::string::npos;
  const char* digits = text.c_str() + (is_float ? 2 : 0);
  char* end = nullptr;
  const uint64_t bits =
      text.starts_with('-') ? uint64_t(strtoll(digits, &end, 0)) : strtoull(digits, &end, is_float ? 16 : 0);
  BLT_CHECK(end != digits && (*end == '\0' || (*end == 'U' && end[1] == '\0')), "unknown operand ", text);
  return constant(bits, width);
}

}  // namespace blt::ptx
