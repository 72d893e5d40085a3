#include "testing/ptx/parser.h"

#include <algorithm>
#include <cctype>

#include "testing/ptx/control_flow.h"
#include "testing/ptx/decode.h"

namespace blt::ptx {

namespace {

std::string without_comments(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      i = std::min(text.find("*/", i), text.size() - 2) + 2;
    } else {
      out += text[i++];
    }
  }
  return out;
}

bool is_word(char c) { return isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%'; }

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> out;
  for (const std::string& word : split(text, ' ')) {
    if (!word.empty()) out.push_back(word);
  }
  return out;
}

int64_t align_up(int64_t at, int64_t alignment) { return (at + alignment - 1) / alignment * alignment; }

// ".param .align 8 .b8 name[40]", ".shared .align 4 .b8 name[64]", ".param .u64 name"
struct Declaration {
  std::string name;
  int64_t bytes, alignment;
};

Declaration parse_declaration(std::string text) {
  std::replace(text.begin(), text.end(), '\t', ' ');
  std::replace(text.begin(), text.end(), '\n', ' ');
  std::vector<std::string> parts = words(text);
  Declaration out{parts.back(), 0, 0};
  int64_t count = 1;
  if (const size_t bracket = out.name.find('['); bracket != std::string::npos) {
    count = atoll(out.name.c_str() + bracket + 1);  // 0 for the memory that a launch asks for
    out.name.resize(bracket);
  }
  for (size_t i = 1; i + 1 < parts.size(); ++i) {
    if (parts[i] == ".align") {
      out.alignment = atoll(parts[++i].c_str());
    } else if (out.bytes == 0 && parts[i] != ".shared" && parts[i] != ".ptr" && parts[i] != ".global") {
      out.bytes = bytes_of_type(parts[i].substr(1));
    }
  }
  if (out.alignment == 0) out.alignment = out.bytes;
  out.bytes *= count;
  return out;
}

// The kernel's text between its braces.
class Body {
 public:
  // `dynamic` names the shared memory that a launch asks for.
  Body(Kernel& kernel, Names& names, const std::vector<Declaration>& dynamic)
      : kernel_(kernel), names_(names), dynamic_(dynamic) {}

  void parse(const std::string& text) {
    size_t at = 0;
    while ((at = text.find_first_not_of(" \t\r\n", at)) != std::string::npos) {
      if (text[at] == '{') {
        names_.open_scope();
        ++at;
      } else if (text[at] == '}') {
        names_.close_scope();
        ++at;
      } else if (text.compare(at, 5, ".loc ") == 0 || text.compare(at, 5, ".loc\t") == 0) {
        const size_t end = std::min(text.find('\n', at), text.size());
        line_ = location(text.substr(at, end - at));
        at = end;
      } else if (const size_t colon = label_end(text, at); colon != std::string::npos) {
        labels_[trimmed(text.substr(at, colon - at))] = int(kernel_.instructions.size());
        at = colon + 1;
      } else {
        const size_t end = text.find(';', at);
        BLT_CHECK(end != std::string::npos, "a statement without its end: ", text.substr(at, 40));
        statement(trimmed(text.substr(at, end - at)));
        at = end + 1;
      }
    }
    finish();
  }

 private:
  // .loc file line column
  static int location(std::string text) {
    std::replace(text.begin(), text.end(), '\t', ' ');
    const std::vector<std::string> parts = words(text);
    return parts.size() > 2 ? atoi(parts[2].c_str()) : 0;
  }

  static size_t label_end(const std::string& text, size_t at) {
    while (at < text.size() && is_word(text[at])) ++at;
    at = std::min(text.find_first_not_of(" \t", at), text.size());
    const bool is_label = at < text.size() && text[at] == ':';
    return is_label ? at : std::string::npos;
  }

  void statement(const std::string& text) {
    if (text.starts_with(".reg")) {
      const std::string rest = trimmed(text.substr(4));
      const size_t end = rest.find_first_of(" \t");
      names_.declare_registers(rest.substr(1, end - 1), split(rest.substr(end), ','));
    } else if (text.starts_with(".shared")) {
      const Declaration memory = parse_declaration(text);
      kernel_.shared_bytes = align_up(kernel_.shared_bytes, memory.alignment);
      names_.declare_symbol(memory.name, kernel_.shared_bytes);
      kernel_.shared_bytes += memory.bytes;
    } else if (text.starts_with(".local")) {
      fail("local memory, which no kernel may use: `", text, "`");
    } else if (text.starts_with(".")) {
      BLT_CHECK(text.starts_with(".pragma"), "unknown directive `", text, "`");
    } else {
      instruction(text);
    }
  }

  // What a launch asks for lies behind the kernel's own shared memory, which is declared before all instructions.
  void place_dynamic() {
    for (const Declaration& memory : dynamic_) {
      kernel_.shared_bytes = align_up(kernel_.shared_bytes, memory.alignment);
      names_.declare_symbol(memory.name, kernel_.shared_bytes);
    }
  }

  void instruction(const std::string& text) {
    if (kernel_.instructions.empty()) place_dynamic();
    std::string label;
    try {
      kernel_.instructions.push_back(decode(text, names_, label));
    } catch (const std::runtime_error& error) {
      fail("`", text, "` (instruction ", kernel_.instructions.size(), "): ", error.what());
    }
    kernel_.instructions.back().line = line_;
    if (!label.empty()) jumps_.push_back({kernel_.instructions.size() - 1, label});
  }

  void finish() {
    for (const auto& [at, label] : jumps_) {
      const auto found = labels_.find(label);
      BLT_CHECK(found != labels_.end(), "`", kernel_.instructions[at].text, "`: unknown label");
      kernel_.instructions[at].target = found->second;
    }
    BLT_CHECK(!kernel_.instructions.empty(), "no instructions");
    const Instruction& last = kernel_.instructions.back();
    BLT_CHECK((last.kind == Kind::leave || last.kind == Kind::branch) && !last.guard.exists(),
              "the last instruction, `", last.text, "`, is neither a return nor a branch");
    find_meetings(kernel_);
  }

  struct Jump {
    size_t instruction;
    std::string label;
  };
  Kernel& kernel_;
  Names& names_;
  const std::vector<Declaration>& dynamic_;
  int line_ = 0;
  std::unordered_map<std::string, int> labels_;
  std::vector<Jump> jumps_;
};

// The shared memory that the file declares outside of its kernels. A kernel has what its text names.
struct ModuleShared {
  std::vector<Declaration> fixed, dynamic;

  explicit ModuleShared(const std::string& text) {
    int depth = 0;
    for (size_t at = 0, line = 0; at < text.size(); ++at) {
      depth += text[at] == '{', depth -= text[at] == '}';
      if (text[at] == '\n') line = at + 1;
      if (depth == 0 && text[at] == ';') {
        const std::string declaration = trimmed(text.substr(line, at - line));
        const size_t shared = declaration.find(".shared");
        if (shared != std::string::npos) {
          const Declaration memory = parse_declaration(declaration.substr(shared));
          (memory.bytes > 0 ? fixed : dynamic).push_back(memory);
        }
      }
    }
  }

  void declare(const std::string& body, Kernel& kernel, Names& names) const {
    for (const Declaration& memory : fixed) {
      if (body.find(memory.name) != std::string::npos) {
        kernel.shared_bytes = align_up(kernel.shared_bytes, memory.alignment);
        names.declare_symbol(memory.name, kernel.shared_bytes);
        kernel.shared_bytes += memory.bytes;
      }
    }
  }
};

size_t closing_brace(const std::string& text, size_t open) {
  int depth = 0;
  for (size_t at = open; at < text.size(); ++at) {
    depth += text[at] == '{', depth -= text[at] == '}';
    if (depth == 0) return at;
  }
  fail("ptx: a kernel without its end");
}

void declare_parameters(const std::string& list, Kernel& kernel, Names& names) {
  for (const std::string& text : split(list, ',')) {
    const Declaration parameter = parse_declaration(text);
    kernel.parameter_bytes = align_up(kernel.parameter_bytes, parameter.alignment);
    names.declare_symbol(parameter.name, kernel.parameter_bytes);
    kernel.parameters.push_back({kernel.parameter_bytes, parameter.bytes});
    kernel.parameter_bytes += parameter.bytes;
  }
}

}  // namespace

std::vector<std::unique_ptr<Kernel>> parse(const std::string& source) {
  constexpr const char* kEntry = ".entry";
  const std::string text = without_comments(source);
  const ModuleShared shared(text);
  std::vector<std::unique_ptr<Kernel>> kernels;
  for (size_t at = 0; (at = text.find(kEntry, at)) != std::string::npos;) {
    const size_t open = text.find('(', at), close = text.find(')', open), brace = text.find('{', close);
    BLT_CHECK(brace != std::string::npos, "ptx: a kernel without a body");
    const size_t end = closing_brace(text, brace), name = at + std::string(kEntry).size();
    const std::string body = text.substr(brace + 1, end - brace - 1);
    auto kernel = std::make_unique<Kernel>();
    kernel->name = trimmed(text.substr(name, open - name));
    Names names(*kernel);
    try {
      declare_parameters(text.substr(open + 1, close - open - 1), *kernel, names);
      shared.declare(body, *kernel, names);
      Body(*kernel, names, shared.dynamic).parse(body);
    } catch (const std::runtime_error& error) {
      kernel->refusal = error.what();
    }
    kernels.push_back(std::move(kernel));
    at = end;
  }
  return kernels;
}

}  // namespace blt::ptx
