// Buffers that outlive a node.
#pragma once

#include <cstddef>
#include <vector>

// This thread's buffers, one set of each type, which keep the room that they have had: only what is more than ever before is
// allocated. Tasks on other threads are given them by reference.
template <class Buffers>
Buffers& buffers() {
  thread_local Buffers own;
  return own;
}

// `count` elements and more that have buffers of their own, so that none is given up.
template <class T>
void at_least(std::vector<T>& elements, size_t count) {
  if (elements.size() < count) elements.resize(count);
}
