#include "testing/ptx/decode.h"

#include <algorithm>

#include "testing/ptx/access.h"

namespace blt::ptx {

namespace {

const Opcodes& opcodes() {
  static const Opcodes all = [] {
    Opcodes opcodes;
    define_integers(opcodes), define_floats(opcodes), define_conversions(opcodes), define_predicates(opcodes);
    define_exchanges(opcodes);
    return opcodes;
  }();
  return all;
}

const Opcodes& atomics() {
  static const Opcodes all = [] {
    Opcodes opcodes;
    define_atomics(opcodes);
    return opcodes;
  }();
  return all;
}

const Opcode& find(const Opcodes& table, const std::string& name, const std::string& opcode) {
  const auto found = table.find(name);
  BLT_CHECK(found != table.end(), "unknown opcode ", opcode);
  return found->second;
}

// Decodes one instruction. Most opcodes have an entry in the table that says what runs and how wide the operands are
// (decode_plain). The others, such as accesses to memory, have operands or modifiers of their own kinds.
class Decoder {
 public:
  Decoder(const std::string& opcode, const std::string& arguments, Names& names, Instruction& out, std::string& label)
      : opcode_(opcode),
        parts_(split(opcode, '.')),
        arguments_(split(arguments, ',')),
        names_(names),
        out_(out),
        label_(label) {}

  void decode() {
    const std::string& base = parts_[0];
    if (base == "bra") {
      decode_branch();
    } else if (opcode_ == "ret" || opcode_ == "exit") {
      out_.kind = Kind::leave;
    } else if (opcode_ == "bar.sync" || opcode_ == "barrier.sync") {
      BLT_CHECK(arguments_ == std::vector<std::string>{"0"}, "unknown kind of barrier: ", opcode_);
      out_.kind = Kind::barrier;
    } else if (base == "ld" || base == "st") {
      decode_access(base == "ld");
    } else if (base == "atom" || base == "red") {
      decode_atomic(base == "atom");
    } else if (base == "setp") {
      decode_comparison();
    } else if (base == "shfl") {
      decode_shuffle();
    } else if (base == "vote") {
      decode_vote();
    } else if (base == "mov" && arguments_.size() == 2 && (is_vector(0) || is_vector(1))) {
      decode_packing();
    } else {
      decode_plain();
    }
  }

 private:
  bool is_vector(size_t argument) const { return arguments_[argument].starts_with('{'); }

  std::vector<std::string> elements_of(size_t argument) const {
    const std::string& text = arguments_[argument];
    return is_vector(argument) ? split(text.substr(1, text.size() - 2), ',') : std::vector<std::string>{text};
  }

  void expect_arguments(size_t count) const {
    BLT_CHECK(arguments_.size() == count, opcode_, " has ", arguments_.size(), " operands instead of ", count);
  }

  void add(const Operand& operand) {
    BLT_CHECK(size_t(out_.num_operands) < out_.operands.size(), "too many operands of ", opcode_);
    out_.operands[size_t(out_.num_operands++)] = operand;
  }

  Operand checked(const Operand& operand, int width) const {
    BLT_CHECK(operand.width == width, "an operand of ", opcode_, " has ", operand.width, " bytes instead of ", width);
    return operand;
  }
  Operand source(const std::string& text, int width) { return checked(names_.source(text, width), width); }
  Operand destination(const std::string& text, int width) { return checked(names_.destination(text), width); }

  void decode_branch() {
    BLT_CHECK(opcode_ == "bra" || opcode_ == "bra.uni", "unknown opcode ", opcode_);
    expect_arguments(1);
    out_.kind = Kind::branch;
    label_ = arguments_[0];
  }

  // "[%rd1+16]", "[symbol]"
  Operand address(const std::string& text) {
    BLT_CHECK(text.starts_with('[') && text.ends_with(']'), "an address of ", opcode_, " is not in brackets: ", text);
    const std::string inner = text.substr(1, text.size() - 2);
    const size_t plus = inner.find('+');
    out_.offset = plus == std::string::npos ? 0 : atoll(inner.c_str() + plus + 1);
    const Operand base = names_.source(trimmed(inner.substr(0, plus)), 8);
    BLT_CHECK(base.width == 8 || base.width == 4, "an address of ", base.width, " bytes");
    return base;
  }

  void decode_access(bool load) {
    expect_arguments(2);
    const std::string& type = parts_.back();
    out_.is_access = true;
    out_.width = bytes_of_type(type);
    out_.is_signed = type[0] == 's';
    std::string space;
    for (size_t i = 1; i + 1 < parts_.size(); ++i) {
      static const std::vector<std::string> hints{"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "v2", "v4"};
      const std::string& part = parts_[i];
      if (part == "global" || part == "shared" || part == "param") {
        space = part;
      } else {
        const bool hint = std::find(hints.begin(), hints.end(), part) != hints.end() || part.starts_with("L1::") ||
                          part.starts_with("L2::");
        BLT_CHECK(hint, "unknown opcode ", opcode_);
      }
    }
    out_.run = space == "global"          ? (load ? load_global : store_global)
               : space == "shared"        ? (load ? load_shared : store_shared)
               : space == "param" && load ? load_parameter
                                          : nullptr;
    BLT_CHECK(out_.run != nullptr, "unknown opcode ", opcode_);
    const std::vector<std::string> elements = elements_of(load ? 0 : 1);
    out_.elements = int(elements.size());
    for (const std::string& element : elements) {
      const Operand operand = element == "_" ? Operand{}
                              : load         ? names_.destination(element)
                                             : names_.source(element, out_.width);
      BLT_CHECK(!operand.exists() || operand.width >= out_.width, "a register of ", opcode_, " is too narrow");
      add(operand);
    }
    add(address(arguments_[load ? 1 : 0]));
  }

  void decode_atomic(bool returns) {
    const Opcode& opcode = find(atomics(), opcode_.substr(opcode_.find('.') + 1), opcode_);
    if (!returns) arguments_.insert(arguments_.begin(), "_");
    expect_arguments(opcode.widths.size());
    out_.run = opcode.run;
    out_.is_access = true;
    out_.width = opcode.widths[0];
    add(arguments_[0] == "_" ? Operand{} : destination(arguments_[0], out_.width));
    add(address(arguments_[1]));
    for (size_t i = 2; i < arguments_.size(); ++i) add(source(arguments_[i], out_.width));
  }

  // Both "a" and "a|b" name destinations; the second is missing in the first.
  void add_destinations(const std::string& text, int first, int second) {
    const size_t bar = text.find('|');
    add(destination(trimmed(text.substr(0, bar)), first));
    add(bar == std::string::npos ? Operand{} : destination(trimmed(text.substr(bar + 1)), second));
  }

  void decode_comparison() {
    BLT_CHECK(parts_.size() == 3 || parts_.size() == 4, "unknown opcode ", opcode_);
    if (parts_.size() == 4) {
      const std::string& combine = parts_[2];
      out_.combine = combine == "and"   ? Combine::conjunction
                     : combine == "or"  ? Combine::disjunction
                     : combine == "xor" ? Combine::exclusive
                                        : Combine::none;
      BLT_CHECK(out_.combine != Combine::none, "unknown opcode ", opcode_);
    }
    const bool combines = out_.combine != Combine::none;
    const Opcode& opcode = find(opcodes(), "setp." + parts_[1] + "." + parts_.back(), opcode_);
    expect_arguments(combines ? 4 : 3);
    out_.run = opcode.run;
    add_destinations(arguments_[0], 0, 0);
    add(source(arguments_[1], opcode.widths[2]));
    add(source(arguments_[2], opcode.widths[3]));
    if (combines) add(source(arguments_[3], 0));
  }

  void decode_shuffle() {
    const Opcode& opcode = find(opcodes(), opcode_, opcode_);
    expect_arguments(5);
    out_.run = opcode.run;
    add_destinations(arguments_[0], 4, 0);
    for (size_t i = 1; i < arguments_.size(); ++i) add(source(arguments_[i], 4));
  }

  void decode_vote() {
    const Opcode& opcode = find(opcodes(), opcode_, opcode_);
    expect_arguments(3);
    out_.run = opcode.run;
    out_.negated = arguments_[1].starts_with('!');
    add(destination(arguments_[0], opcode.widths[0]));
    add(source(arguments_[1].substr(out_.negated ? 1 : 0), 0));
    add(source(arguments_[2], 4));
  }

  void decode_packing() {
    const bool packs = is_vector(1);
    BLT_CHECK(parts_.size() == 2 && !(is_vector(0) && is_vector(1)), "unknown opcode ", opcode_);
    const int whole = bytes_of_type(parts_[1]);
    const std::vector<std::string> elements = elements_of(packs ? 1 : 0);
    const int width = whole / int(elements.size());
    out_.width = width, out_.elements = int(elements.size());
    out_.run = packs ? pack : unpack;
    if (packs) add(destination(arguments_[0], whole));
    for (const std::string& element : elements) {
      add(packs ? source(element, width) : element == "_" ? Operand{} : destination(element, width));
    }
    if (!packs) add(source(arguments_[1], whole));
  }

  static void copy(unsigned char* to, int to_stride, const unsigned char* from, int from_stride, int width,
                   Mask lanes) {
    for_each_lane(lanes, [&](int l) { memcpy(to + l * to_stride, from + l * from_stride, size_t(width)); });
  }
  static void pack(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Operand whole = instruction.operands[0];
    for (int e = 0; e < instruction.elements; ++e) {
      const Operand& element = instruction.operands[size_t(e) + 1];
      copy(warp.registers + whole.at + e * element.width, whole.width, warp.registers + element.at, element.width,
           instruction.width, lanes);
    }
  }
  static void unpack(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Operand whole = instruction.operands[size_t(instruction.elements)];
    for (int e = 0; e < instruction.elements; ++e) {
      const Operand& element = instruction.operands[size_t(e)];
      if (!element.exists()) continue;
      copy(warp.registers + element.at, element.width, warp.registers + whole.at + e * instruction.width, whole.width,
           instruction.width, lanes);
    }
  }

  void decode_plain() {
    const Opcode& opcode = find(opcodes(), opcode_, opcode_);
    expect_arguments(opcode.widths.size());
    out_.run = opcode.run;
    bool wide = false;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const int width = opcode.widths[i];
      const bool is_destination = i == 0 && opcode_ != "bar.warp.sync";
      const Operand operand = is_destination ? names_.destination(arguments_[0]) : names_.source(arguments_[i], width);
      if (operand.width > width && opcode.run_wide != nullptr) {
        wide = true;
      } else {
        checked(operand, width);
      }
      add(operand);
    }
    if (wide) out_.run = opcode.run_wide;
  }

  const std::string& opcode_;
  std::vector<std::string> parts_, arguments_;
  Names& names_;
  Instruction& out_;
  std::string& label_;
};

}  // namespace

Instruction decode(const std::string& text, Names& names, std::string& label) {
  constexpr const char* kBlanks = " \t\r\n";
  Instruction out;
  out.text = text;
  std::string rest = text;
  if (rest.starts_with('@')) {
    const size_t end = rest.find_first_of(kBlanks);
    out.guard_negated = rest[1] == '!';
    out.guard = names.destination(rest.substr(out.guard_negated ? 2 : 1, end - (out.guard_negated ? 2 : 1)));
    rest = trimmed(rest.substr(end));
  }
  const size_t end = rest.find_first_of(kBlanks);
  const std::string opcode = rest.substr(0, end), arguments = end == std::string::npos ? "" : rest.substr(end);
  Decoder(opcode, arguments, names, out, label).decode();
  return out;
}

}  // namespace blt::ptx
