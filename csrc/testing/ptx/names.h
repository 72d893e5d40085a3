// What the names in a kernel's text stand for.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "testing/ptx/kernel.h"

namespace blt::ptx {

// Bytes of a type by its name without the dot: "b32", "bf16x2", "pred" (0).
int bytes_of_type(const std::string& type);

// Parts of a text between separators that are outside of braces and brackets, without the blanks around them.
std::vector<std::string> split(const std::string& text, char separator);
std::string trimmed(const std::string& text);

class Names {
 public:
  explicit Names(Kernel& kernel) : kernel_(kernel) { open_scope(); }

  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }

  // "%r<98>" stands for %r0 to %r97.
  void declare_registers(const std::string& type, const std::vector<std::string>& names);
  void declare_symbol(const std::string& name, int64_t value) { symbols_[name] = value; }

  bool is_register(const std::string& name) { return find(name) != nullptr; }
  Operand destination(const std::string& name);
  // A register of its own width, or a special register, number or symbol of this width.
  Operand source(const std::string& text, int width);
  Operand constant(uint64_t bits, int width);

 private:
  struct Registers {
    int width;
    std::vector<Operand> places;  // given out when a register is first used
  };
  using Scope = std::unordered_map<std::string, Registers>;

  Operand* find(const std::string& name);
  Operand allocate(int width);
  Operand special(const std::string& name, int width);

  Kernel& kernel_;
  std::vector<Scope> scopes_;
  std::map<std::string, int64_t> symbols_;
  std::map<std::pair<uint64_t, int>, Operand> constants_;
};

}  // namespace blt::ptx
