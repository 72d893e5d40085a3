#include "testing/ptx/control_flow.h"

namespace blt::ptx {

namespace {

constexpr int kUnknown = -1;

// Stretches of instructions that run from the first to the last. One more stands for the end of the kernel.
struct Graph {
  std::vector<int> first;  // instruction of each stretch
  std::vector<std::vector<int>> successors, predecessors;
  int end() const { return int(first.size()); }
};

Graph build_graph(const std::vector<Instruction>& code) {
  const int count = int(code.size());
  std::vector<bool> starts(size_t(count) + 1, false);
  starts[0] = true;
  for (int i = 0; i < count; ++i) {
    const Instruction& instruction = code[size_t(i)];
    if (instruction.kind == Kind::branch) starts[size_t(instruction.target)] = true;
    if (instruction.kind == Kind::branch || instruction.kind == Kind::leave) starts[size_t(i) + 1] = true;
  }
  Graph graph;
  std::vector<int> stretch_of(size_t(count) + 1);
  for (int i = 0; i < count; ++i) {
    if (starts[size_t(i)]) graph.first.push_back(i);
    stretch_of[size_t(i)] = int(graph.first.size()) - 1;
  }
  stretch_of[size_t(count)] = graph.end();
  graph.successors.resize(size_t(graph.end()) + 1);
  graph.predecessors.resize(size_t(graph.end()) + 1);
  for (int s = 0; s < graph.end(); ++s) {
    const int after = s + 1 < graph.end() ? graph.first[size_t(s) + 1] : count;
    const Instruction& last = code[size_t(after) - 1];
    const auto edge = [&](int instruction) {
      const int to = stretch_of[size_t(instruction)];
      graph.successors[size_t(s)].push_back(to);
      graph.predecessors[size_t(to)].push_back(s);
    };
    if (last.kind == Kind::branch) edge(last.target);
    if (last.kind == Kind::leave) edge(count);
    const bool always = (last.kind == Kind::branch || last.kind == Kind::leave) && !last.guard.exists();
    if (!always) edge(after);
  }
  return graph;
}

// The stretches that reach the end, in postorder of a walk from the end against the edges: the end comes last.
std::vector<int> postorder_from_end(const Graph& graph) {
  struct Visit {
    int stretch;
    size_t next;
  };
  std::vector<int> order;
  std::vector<bool> seen(graph.predecessors.size(), false);
  std::vector<Visit> stack{{graph.end(), 0}};
  seen[size_t(graph.end())] = true;
  while (!stack.empty()) {
    Visit& visit = stack.back();
    const std::vector<int>& before = graph.predecessors[size_t(visit.stretch)];
    if (visit.next == before.size()) {
      order.push_back(visit.stretch);
      stack.pop_back();
    } else if (const int stretch = before[visit.next++]; !seen[size_t(stretch)]) {
      seen[size_t(stretch)] = true;
      stack.push_back({stretch, 0});
    }
  }
  return order;
}

// The immediate post-dominator of each stretch (Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm").
std::vector<int> post_dominators(const Graph& graph) {
  const std::vector<int> order = postorder_from_end(graph);
  std::vector<int> rank(graph.successors.size(), kUnknown), dominator(graph.successors.size(), kUnknown);
  for (size_t i = 0; i < order.size(); ++i) rank[size_t(order[i])] = int(i);
  const auto common = [&](int a, int b) {
    while (a != b) {
      int& lower = rank[size_t(a)] < rank[size_t(b)] ? a : b;
      lower = dominator[size_t(lower)];
    }
    return a;
  };
  dominator[size_t(graph.end())] = graph.end();
  for (bool changed = true; changed;) {
    changed = false;
    for (auto stretch = order.rbegin() + 1; stretch != order.rend(); ++stretch) {
      int found = kUnknown;
      for (const int next : graph.successors[size_t(*stretch)]) {
        if (dominator[size_t(next)] != kUnknown) found = found == kUnknown ? next : common(next, found);
      }
      changed |= dominator[size_t(*stretch)] != found;
      dominator[size_t(*stretch)] = found;
    }
  }
  return dominator;
}

}  // namespace

void find_meetings(Kernel& kernel) {
  std::vector<Instruction>& code = kernel.instructions;
  if (code.empty()) return;
  const Graph graph = build_graph(code);
  const std::vector<int> dominator = post_dominators(graph);
  for (int s = 0; s < graph.end(); ++s) {
    const int after = s + 1 < graph.end() ? graph.first[size_t(s) + 1] : int(code.size());
    Instruction& last = code[size_t(after) - 1];
    if (last.kind == Kind::branch) {
      const int meeting = dominator[size_t(s)];
      last.meeting = meeting == kUnknown || meeting == graph.end() ? int(code.size()) : graph.first[size_t(meeting)];
    }
  }
}

}  // namespace blt::ptx
