// Python module of the tests: the functions that kernels are made of, by themselves, on numpy arrays. They are the host
// twins, and run as in csrc/testing/emulator.h. No wheel has it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/layout.cuh"

namespace {

namespace py = pybind11;
using blt::bfloat16;
using blt::float16;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Runs body(t) in the threads of one block, each of which has an element of x.
template <class T, class Body>
void in_block(const Array<T>& x, int threads, const Body& body) {
  if (x.ndim() != 1 || x.size() != threads) {
    throw py::value_error("expected one dimension with " + std::to_string(threads) + " elements");
  }
  blt::emulator::launch(dim3(1), dim3(unsigned(threads)), 0, [&] { body(int(threadIdx.x)); });
}

// The result that each lane of a warp has.
template <class T, class F>
Array<T> on_warp(const Array<T>& x, const F& f) {
  Array<T> out(x.size());
  const T* in = x.data();
  T* results = out.mutable_data();
  in_block(x, blt::cuda::kWarp, [&](int t) { results[t] = f(in[t]); });
  return out;
}

// What each thread of a block gets: that of the threads before it, and that of all.
template <class Op>
py::tuple block_scan(const Array<int64_t>& x) {
  Array<int64_t> before(x.size()), total(x.size());
  const int64_t* in = x.data();
  int64_t *befores = before.mutable_data(), *totals = total.mutable_data();
  in_block(x, blt::cuda::kLayoutThreads, [&](int t) {
    const auto scan = blt::cuda::block_scan(in[t], Op());
    befores[t] = scan.before, totals[t] = scan.total;
  });
  return py::make_tuple(before, total);
}

// Functions of a 16-bit type; its elements are uint16, and pairs of them uint32.
template <class T>
void define_16_bit(py::module_& m, const std::string& type) {
  using namespace blt::cuda;
  const auto define = [&](const char* name, auto f) { m.def((name + ("_" + type)).c_str(), f); };
  define("widen", py::vectorize([](uint16_t x) { return widen(bit_cast<T>(x)); }));
  define("narrow", py::vectorize([](float x) { return narrow<T>(x).bits; }));
  define("pair_of", py::vectorize([](float low, float high) { return pair_of<T>(low, high); }));
  define("low_of", py::vectorize([](uint32_t pair) { return low_of<T>(pair); }));
  define("high_of", py::vectorize([](uint32_t pair) { return high_of<T>(pair); }));
  define("max_or_nan_pair", py::vectorize([](uint32_t a, uint32_t b) { return max_or_nan_pair<T>(a, b); }));
  define("min_or_nan_pair", py::vectorize([](uint32_t a, uint32_t b) { return min_or_nan_pair<T>(a, b); }));
}

}  // namespace

PYBIND11_MODULE(blt_device_helpers, m) {
  using namespace blt::cuda;
  define_16_bit<bfloat16>(m, "bfloat16");
  define_16_bit<float16>(m, "float16");
  m.def("max_or_nan", py::vectorize([](float a, float b) { return max_or_nan(a, b); }));
  m.def("min_or_nan", py::vectorize([](float a, float b) { return min_or_nan(a, b); }));
  m.def("exp2_approx", py::vectorize([](float x) { return exp2_approx(x); }));
  m.def("log2_approx", py::vectorize([](float x) { return log2_approx(x); }));
  m.def("reciprocal_approx", py::vectorize([](float x) { return reciprocal_approx(x); }));
  m.def("warp_max", [](const Array<float>& x) { return on_warp(x, [](float v) { return warp_max(v); }); });
  m.def("warp_sum", [](const Array<double>& x) { return on_warp(x, [](double v) { return warp_sum(v); }); });
  m.def("warp_scan_sum",
        [](const Array<int64_t>& x) { return on_warp(x, [](int64_t v) { return warp_scan(v, blt::cuda::Sum()); }); });
  m.def("block_scan_sum", &block_scan<blt::cuda::Sum>);
  m.def("block_scan_max", &block_scan<blt::cuda::Max>);
}
