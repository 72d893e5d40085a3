// The ops through which the tests talk to the interpreter.
#include <algorithm>
#include <string>

#include "ops/tensor.h"
#include "testing/ptx/interpreter.h"

namespace {

using blt::Tensor;
using blt::ptx::Counters;
using blt::ptx::Instruction;
using blt::ptx::Interpreter;
using blt::ptx::Kernel;

Interpreter& interpreter() { return Interpreter::instance(); }

// Reads the kernels of a PTX file.
void ptx_load(const std::string& path) { interpreter().load(path); }

// Whether launches of the library run the loaded kernels, and whether the last block and warp run first.
void ptx_mode(bool on, bool reversed) { interpreter().set_mode(on, reversed); }

std::string names_of_kernels(bool launched_only) {
  std::string out;
  for (const auto& [name, kernel] : interpreter().kernels()) {
    if (kernel->launched || !launched_only) out += name + "\n";
  }
  return out;
}
// Mangled names, one a line: of all kernels, and of those launched since they were loaded.
std::string ptx_kernels() { return names_of_kernels(false); }
std::string ptx_launched() { return names_of_kernels(true); }

// Sets all counts to zero.
void ptx_reset() {
  for (const auto& [name, kernel] : interpreter().kernels()) {
    for (const Instruction& instruction : kernel->instructions) instruction.counters = {};
  }
}

// int64 [instructions, 7]: line, times that a warp executed it, lanes that did, 32-byte sectors and distinct bytes of
// global memory that the accesses touched, passes through the banks of shared memory, bytes of one lane's access.
Tensor ptx_counts(const std::string& name) {
  const Kernel& kernel = interpreter().kernel(name);
  constexpr int64_t kColumns = 7;
  const Tensor out = blt::empty({int64_t(kernel.instructions.size()), kColumns}, blt::ScalarType::Long);
  int64_t* row = out.mutable_data_ptr<int64_t>();
  for (const Instruction& instruction : kernel.instructions) {
    const Counters& counters = instruction.counters;
    const int64_t values[kColumns] = {instruction.line,
                                      counters.warps,
                                      counters.lanes,
                                      counters.sectors,
                                      counters.bytes,
                                      counters.wavefronts,
                                      instruction.is_access ? instruction.access() : 0};
    row = std::copy(values, values + kColumns, row);
  }
  return out;
}

// int64 [2]: the threads of a block in the kernel's last launch, and the bytes of its shared memory.
Tensor ptx_block(const std::string& name) {
  const Kernel& kernel = interpreter().kernel(name);
  const Tensor out = blt::empty({2}, blt::ScalarType::Long);
  out.mutable_data_ptr<int64_t>()[0] = kernel.launched_threads;
  out.mutable_data_ptr<int64_t>()[1] = kernel.launched_shared;
  return out;
}

// The text of a kernel's instructions, one a line.
std::string ptx_text(const std::string& name) {
  std::string out;
  for (const Instruction& instruction : interpreter().kernel(name).instructions) {
    std::string line = instruction.text;
    std::replace(line.begin(), line.end(), '\n', ' ');
    out += line + "\n";
  }
  return out;
}

// From here on kernels may touch the memory of t, as far as its elements lie apart.
void ptx_allow(const Tensor& t) { blt::touchable(t); }
void ptx_forbid_all() { interpreter().memory().forbid_all(); }

// Whether the blocks of a launch are refused bytes that another of them writes: only values that are no layout may do
// so.
void ptx_check_blocks(bool on) { interpreter().memory().check_blocks(on); }

// Launches a kernel whose parameters are pointers to these tensors; it may touch nothing else.
void ptx_run(const std::string& kernel, int64_t grid, int64_t block, int64_t shared, std::vector<Tensor> args) {
  ptx_forbid_all();
  std::vector<void*> pointers;
  for (const Tensor& t : args) {
    blt::touchable(t);
    pointers.push_back(t.mutable_data_ptr());
  }
  std::vector<blt::ptx::Argument> arguments;
  for (const void* const& pointer : pointers) {
    arguments.push_back({&pointer, int64_t(sizeof(pointer))});
  }
  interpreter().launch(kernel, {grid, int(block), shared}, arguments);
}

}  // namespace

namespace blt {

Tensor touchable(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  if (t.numel() > 0) interpreter().memory().allow(t.const_data_ptr(), (last + 1) * int64_t(t.element_size()));
  return t;
}

}  // namespace blt

STABLE_TORCH_LIBRARY_FRAGMENT(blt_kernels_emulated, m) {
  m.def("ptx_load(str path) -> ()");
  m.def("ptx_mode(bool on, bool reversed) -> ()");
  m.def("ptx_kernels() -> str");
  m.def("ptx_launched() -> str");
  m.def("ptx_reset() -> ()");
  m.def("ptx_counts(str kernel) -> Tensor");
  m.def("ptx_block(str kernel) -> Tensor");
  m.def("ptx_text(str kernel) -> str");
  m.def("ptx_allow(Tensor t) -> ()");
  m.def("ptx_forbid_all() -> ()");
  m.def("ptx_check_blocks(bool on) -> ()");
  m.def("ptx_run(str kernel, int grid, int block, int shared, Tensor[] args) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(blt_kernels_emulated, CompositeExplicitAutograd, m) {
  m.impl("ptx_load", TORCH_BOX(&ptx_load));
  m.impl("ptx_mode", TORCH_BOX(&ptx_mode));
  m.impl("ptx_kernels", TORCH_BOX(&ptx_kernels));
  m.impl("ptx_launched", TORCH_BOX(&ptx_launched));
  m.impl("ptx_reset", TORCH_BOX(&ptx_reset));
  m.impl("ptx_counts", TORCH_BOX(&ptx_counts));
  m.impl("ptx_block", TORCH_BOX(&ptx_block));
  m.impl("ptx_text", TORCH_BOX(&ptx_text));
  m.impl("ptx_allow", TORCH_BOX(&ptx_allow));
  m.impl("ptx_forbid_all", TORCH_BOX(&ptx_forbid_all));
  m.impl("ptx_check_blocks", TORCH_BOX(&ptx_check_blocks));
  m.impl("ptx_run", TORCH_BOX(&ptx_run));
}
