// Runs the threads of a grid, as fibers, in an order drawn from a seed. Some warps run far ahead of
// others and the lanes of a warp run in any order, so a missing barrier shows as a wrong answer. A
// barrier or a warp collective that not all threads of its group reach is an error.
#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <list>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fhsim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Where {
  const char* file;
  int line;
  std::string str() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Thread;

// Threads that must meet: a block at a barrier, or the lanes of a mask.
struct Meeting {
  const char* operation;
  Where where;    // of the first to arrive
  uint32_t mask;  // of lanes; for a block all ones
  std::vector<Thread*> waiting;
  uint32_t lanes = 0;   // that arrived
  unsigned inside = 0;  // not yet left: set when all have come
  uint64_t value[32];
};

struct Warp {
  uint32_t live = 0;  // lanes that have not returned
  uint64_t priority = 0;
  std::vector<Thread*> ready;
  std::list<Meeting> meetings;
};

struct Shared {
  const void* key;
  const char* name;
  std::unique_ptr<char[]> bytes;
  size_t size;
};

struct Block {
  uint3 index;
  unsigned live = 0;  // threads that have not returned
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
  std::list<Meeting> meetings;
  std::list<Shared> shared;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned lane;
  Warp* warp;
  Block* block;
};

struct Machine {
  dim3 grid, block;
  size_t dynamic = 0;  // bytes of dynamic shared memory
  std::function<void()> kernel;
  std::list<Block> resident;
  std::vector<std::unique_ptr<Thread>> idle;
  uint64_t random = 0x9E3779B97F4A7C15;
  std::string failure;
  char started, finished;  // tags: what the host did before a launch, and sees after it
};

inline Machine machine;
inline Thread* running = nullptr;

constexpr unsigned resident_blocks = 3;            // at a time, their warps interleaved
constexpr size_t shared_bytes_at_most = 48 << 10;  // more needs an attribute on real hardware
#ifdef __SANITIZE_ADDRESS__
constexpr size_t guard = 0;  // AddressSanitizer has its own, and names the line
#else
constexpr size_t guard = 64;  // bytes after a shared array
#endif
constexpr char poison = (char)0xff;  // floats and doubles of these bytes are NaN

inline uint64_t draw() {  // xorshift64
  uint64_t& x = machine.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

// The seed determines the order of all threads.
inline void seed(uint64_t number) {
  machine.random = number * 0x9E3779B97F4A7C15 + 0x1234567;
  for (int i = 0; i < 4; ++i) draw();
}

inline unsigned expected(const Thread& thread, const Meeting& meeting, bool of_warp) {
  return of_warp ? __builtin_popcount(thread.warp->live & meeting.mask) : thread.block->live;
}

inline void wake(Meeting& meeting) {
  meeting.inside = meeting.waiting.size();
  for (Thread* thread : meeting.waiting) thread->warp->ready.push_back(thread);
  meeting.waiting.clear();
}

// Waits for all live lanes of mask, or of the block, then returns read(the meeting).
template <class Read>
auto meet(bool of_warp, uint32_t mask, const char* operation, Where where, bool orders_memory,
          uint64_t value, Read read) {
  Unwatched unwatched;
  Thread& me = *running;
  std::list<Meeting>& meetings = of_warp ? me.warp->meetings : me.block->meetings;
  if (!(mask >> me.lane & 1))
    throw Error(where.str() + ": lane " + std::to_string(me.lane) + " is not in the mask of its " +
                operation);
  auto open = std::find_if(meetings.begin(), meetings.end(),
                           [&](const Meeting& m) { return !m.inside && (m.mask >> me.lane & 1); });
  if (open == meetings.end())
    open = meetings.insert(open, Meeting{operation, where, mask, {}, 0, 0, {}});
  const bool same = open->operation == operation && open->mask == mask;
  // Two source lines of a warp operation may be merged by inlining; two barriers of a block may
  // not.
  if (!same || (!of_warp && open->where.line != where.line))
    throw Error("threads of one group meet at different places: " + std::string(open->operation) +
                " of " + open->where.str() + " and " + operation + " of " + where.str());
  Meeting& meeting = *open;
  if (orders_memory) publish(&meeting);
  if (of_warp) meeting.value[me.lane] = value, meeting.lanes |= 1u << me.lane;
  meeting.waiting.push_back(&me);
  if (meeting.waiting.size() == expected(me, meeting, of_warp)) wake(meeting);
  me.fiber.leave();
  if (orders_memory) observe(&meeting);
  auto result = read(meeting);
  if (--meeting.inside == 0) meetings.erase(open);
  return result;
}

// A thread that returns no longer counts at barriers.
inline void retire(Thread& thread) {
  --thread.block->live, thread.warp->live &= ~(1u << thread.lane);
  for (bool of_warp : {false, true})
    for (Meeting& m : of_warp ? thread.warp->meetings : thread.block->meetings)
      if (!m.waiting.empty() && m.waiting.size() == expected(thread, m, of_warp)) wake(m);
}

inline void run_kernel() {
  try {
    machine.kernel();
  } catch (const Error& error) {
    Unwatched unwatched;
    if (machine.failure.empty()) machine.failure = error.what();
  }
}

inline void fiber_main() {
  Fiber::arrived();
  observe(&machine.started);
  run_kernel();
  publish(&machine.finished);
  Unwatched unwatched;
  retire(*running);
  running->fiber.leave(true);
}

inline void start(uint3 index) {
  const dim3 size = machine.block;
  const unsigned threads = size.x * size.y * size.z;
  Block& block = machine.resident.emplace_back();
  block.index = index, block.live = threads;
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.priority = draw();
  for (unsigned rank = 0; rank < threads; ++rank) {
    if (machine.idle.empty()) machine.idle.push_back(std::make_unique<Thread>());
    Thread* thread = machine.idle.back().release();
    machine.idle.pop_back();
    thread->index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
    thread->lane = rank % 32, thread->warp = &block.warps[rank / 32], thread->block = &block;
    thread->fiber.prepare(fiber_main);
    thread->warp->live |= 1u << thread->lane;
    thread->warp->ready.push_back(thread);
    block.threads.push_back(thread);
  }
}

inline void finish(std::list<Block>::iterator block) {
  for (Thread* thread : block->threads) machine.idle.emplace_back(thread);
  for (const Shared& array : block->shared)
    for (size_t i = 0; i < guard; ++i)
      if (array.bytes[array.size + i] != poison && machine.failure.empty())
        machine.failure = std::string("a write behind shared array ") + array.name;
  machine.resident.erase(block);
}

// Some of the waiting threads, for the message.
inline std::string who_waits() {
  std::string text = "deadlock: not all threads of the group reached";
  unsigned named = 0;
  for (Block& block : machine.resident) {
    std::vector<const Meeting*> open;
    for (Meeting& meeting : block.meetings) open.push_back(&meeting);
    for (Warp& warp : block.warps)
      for (Meeting& meeting : warp.meetings) open.push_back(&meeting);
    for (const Meeting* m : open)
      if (!m->waiting.empty() && named++ < 4)
        text += (named > 1 ? "; " : " ") + std::string(m->operation) + " of " + m->where.str() +
                " (" + std::to_string(m->waiting.size()) + " did, of block " +
                std::to_string(block.index.x) + ")";
  }
  return text;
}

// The ready warp of highest priority, or null. Priorities change at times, so warps overtake.
inline Warp* next_warp() {
  Warp* best = nullptr;
  for (Block& block : machine.resident)
    for (Warp& warp : block.warps)
      if (!warp.ready.empty() && (!best || warp.priority > best->priority)) best = &warp;
  if (best && draw() % 256 == 0) best->priority = draw();
  return best;
}

inline void run(dim3 grid, dim3 block, size_t dynamic, std::function<void()> kernel) {
  Unwatched unwatched;
  machine.grid = grid, machine.block = block, machine.dynamic = dynamic;
  machine.kernel = std::move(kernel), machine.failure.clear();
  std::vector<uint3> queue;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) queue.push_back({x, y, z});
  for (size_t i = queue.size(); i > 1; --i) std::swap(queue[i - 1], queue[draw() % i]);
  publish(&machine.started);
  while (machine.failure.empty() && (!queue.empty() || !machine.resident.empty())) {
    for (; !queue.empty() && machine.resident.size() < resident_blocks; queue.pop_back())
      start(queue.back());
    Warp* warp = next_warp();
    if (!warp) {
      machine.failure = who_waits();
      break;
    }
    std::swap(warp->ready[draw() % warp->ready.size()], warp->ready.back());
    running = warp->ready.back();
    warp->ready.pop_back();
    running->fiber.enter();
    for (auto block = machine.resident.begin(); block != machine.resident.end();) {
      const auto at = block++;
      if (!at->live) finish(at);
    }
  }
  running = nullptr;
  while (!machine.resident.empty()) finish(machine.resident.begin());
  observe(&machine.finished);
  if (!machine.failure.empty()) throw Error(machine.failure);
}

// The block's array of this key, poisoned when its first thread asks for it.
inline void* shared_array(const void* key, const char* name, size_t size) {
  Unwatched unwatched;
  std::list<Shared>& arrays = running->block->shared;
  size_t total = size;
  for (const Shared& array : arrays) {
    if (array.key == key) return array.bytes.get();
    total += array.size;
  }
  if (total > shared_bytes_at_most)
    throw Error(std::string("more than 48 KB of shared memory at ") + name);
  Shared& array = arrays.emplace_back(Shared{key, name, nullptr, size});
  array.bytes.reset(new char[size + guard]);
  memset(array.bytes.get(), poison, size + guard);
  return array.bytes.get();
}

}  // namespace fhsim
