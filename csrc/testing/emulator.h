// CUDA's execution model on the host, one block after the other. The threads of a block are fibers of one host thread,
// and each runs until it meets a barrier. Under a sanitizer they are host threads, so that it sees what a kernel gets
// wrong within a block: a missing barrier, or an index out of bounds. Races between blocks cannot show here.
//
// Two things differ from a GPU or may surprise: `__shared__` is a static variable of the function, so it keeps its
// values from block to block, and warps do not run in lockstep, as on any GPU since Volta.
#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace blt::emulator {

constexpr int kWarp = 32;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define BLT_EMULATE_WITH_THREADS
#endif

#if defined(BLT_EMULATE_WITH_THREADS)
// Threads wait on a condition variable, and the thread that opens a barrier wakes them.
class Waiting {
 public:
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  void wait() {
    std::unique_lock held(mutex_, std::adopt_lock);
    condition_.wait(held);
    held.release();
  }
  void wake() { condition_.notify_all(); }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
};
#else
void yield();  // lets the next fiber run

// Fibers wait by letting the others run. One host thread runs them all, so nothing needs a lock or a wake-up.
class Waiting {
 public:
  void lock() {}
  void unlock() {}
  void wait() { yield(); }
  void wake() {}
};
#endif

// All threads that still run wait for each other here. Nobody waits for a thread that has returned.
class Barrier {
 public:
  void reset(int count) { expected_ = count, arrived_ = 0; }

  void wait() {
    waiting_.lock();
    const uint64_t phase = phase_;
    if (++arrived_ == expected_) {
      open();
    }
    while (phase_ == phase) {
      waiting_.wait();
    }
    waiting_.unlock();
  }

  void leave() {
    waiting_.lock();
    --expected_;
    if (expected_ > 0 && arrived_ == expected_) {
      open();
    }
    waiting_.unlock();
  }

 private:
  void open() {
    arrived_ = 0;
    ++phase_;
    waiting_.wake();
  }

  Waiting waiting_;
  int expected_ = 0, arrived_ = 0;
  uint64_t phase_ = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[kWarp];
};

struct Block {
  Barrier barrier;
  std::unique_ptr<Warp[]> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Thread {
  dim3 thread, block, threads, blocks;
  Block* home = nullptr;
  Warp& warp() const { return home->warps[thread.x / kWarp]; }
  int lane() const { return int(thread.x % kWarp); }
};

inline thread_local Thread* self = nullptr;

inline void run_thread(const std::function<void()>& kernel) {
  kernel();
  self->warp().barrier.leave();
  self->home->barrier.leave();
}

#if defined(BLT_EMULATE_WITH_THREADS)
inline void run_block(std::vector<Thread>& threads, const std::function<void()>& kernel) {
  std::vector<std::thread> team;
  for (Thread& thread : threads) {
    team.emplace_back([&] {
      self = &thread;
      run_thread(kernel);
    });
  }
  for (std::thread& thread : team) {
    thread.join();
  }
}
#else
struct Fibers {
  std::vector<ucontext_t> contexts;
  std::vector<bool> done;
  ucontext_t scheduler;
  size_t current = 0;
  const std::function<void()>* kernel = nullptr;
};

inline Fibers fibers;

inline void yield() { swapcontext(&fibers.contexts[fibers.current], &fibers.scheduler); }

inline void fiber_main() {
  run_thread(*fibers.kernel);
  fibers.done[fibers.current] = true;
}

inline void run_block(std::vector<Thread>& threads, const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 * 1024;
  static std::vector<unsigned char> stacks;
  if (stacks.size() < threads.size() * kStack) {
    stacks.resize(threads.size() * kStack);
  }
  fibers.contexts.resize(threads.size());
  fibers.done.assign(threads.size(), false);
  fibers.kernel = &kernel;
  for (size_t t = 0; t < threads.size(); ++t) {
    ucontext_t& context = fibers.contexts[t];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + t * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &fibers.scheduler;
    makecontext(&context, fiber_main, 0);
  }
  for (size_t left = threads.size(); left > 0;) {
    for (size_t t = 0; t < threads.size(); ++t) {
      if (!fibers.done[t]) {
        fibers.current = t;
        self = &threads[t];
        swapcontext(&fibers.scheduler, &fibers.contexts[t]);
        left -= fibers.done[t];
      }
    }
  }
}
#endif

// Runs kernel() in every thread of every block. Grids and blocks have one dimension.
inline void launch(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel) {
  const int count = int(threads.x), num_warps = (count + kWarp - 1) / kWarp;
  for (unsigned b = 0; b < blocks.x; ++b) {
    Block block;
    block.barrier.reset(count);
    block.warps = std::make_unique<Warp[]>(size_t(num_warps));
    for (int w = 0; w < num_warps; ++w) {
      block.warps[size_t(w)].barrier.reset(count - w * kWarp < kWarp ? count - w * kWarp : kWarp);
    }
    // Hardly more than the kernel asked for, so that overruns show.
    block.shared = std::make_unique<unsigned char[]>(shared + 16);
    std::vector<Thread> team(size_t(count), Thread{dim3(), dim3(b), threads, blocks, &block});
    for (int t = 0; t < count; ++t) {
      team[size_t(t)].thread = dim3(unsigned(t));
    }
    run_block(team, kernel);
  }
}

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = self->warp();
  memcpy(&warp.slots[self->lane()], &value, sizeof(T));
  warp.barrier.wait();
  T result;
  memcpy(&result, &warp.slots[from & (kWarp - 1)], sizeof(T));
  warp.barrier.wait();
  return result;
}

inline unsigned char* dynamic_shared() {
  auto address = reinterpret_cast<uintptr_t>(self->home->shared.get());
  return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

}  // namespace blt::emulator

#define threadIdx (::blt::emulator::self->thread)
#define blockIdx (::blt::emulator::self->block)
#define blockDim (::blt::emulator::self->threads)
#define gridDim (::blt::emulator::self->blocks)

inline void __syncthreads() { ::blt::emulator::self->home->barrier.wait(); }
inline void __syncwarp(unsigned = 0xffffffffu) { ::blt::emulator::self->warp().barrier.wait(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = ::blt::emulator::kWarp) {
  const int group = ::blt::emulator::self->lane() & ~(width - 1);  // the first lane of the group
  return ::blt::emulator::exchange(value, group | (lane & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return ::blt::emulator::exchange(value, ::blt::emulator::self->lane() ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned lanes) {
  const int lane = ::blt::emulator::self->lane();
  return ::blt::emulator::exchange(value, lane < int(lanes) ? lane : lane - int(lanes));
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned lanes) {
  const int lane = ::blt::emulator::self->lane();
  return ::blt::emulator::exchange(value, lane + int(lanes) >= ::blt::emulator::kWarp ? lane : lane + int(lanes));
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  ::blt::emulator::Warp& warp = ::blt::emulator::self->warp();
  warp.slots[::blt::emulator::self->lane()] = predicate != 0;
  warp.barrier.wait();
  unsigned bits = 0;
  for (int lane = 0; lane < ::blt::emulator::kWarp; ++lane) {
    bits |= unsigned(warp.slots[lane]) << lane;
  }
  warp.barrier.wait();
  return bits;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& x) {
  *p = x;
}

template <class T>
T atomicAdd(T* p, T x) {
  return std::atomic_ref<T>(*p).fetch_add(x);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
