// Errors: what failed, the values, and what to do, a line each; and the exit code that a program should end with.
#pragma once

#include <stdexcept>
#include <string>

namespace v4export {

// The same codes as the command line's of Python.
enum class Exit { NUMBERS = 1, INPUT = 2, RESOURCES = 3, UNSUPPORTED = 4 };

class Error : public std::runtime_error {
 public:
  Error(Exit code, const std::string& what, const std::string& values, const std::string& fix)
      : std::runtime_error(what + "\n  " + values + "\n  " + fix), code_(code) {}

  Exit code() const { return code_; }

 private:
  Exit code_;
};

}  // namespace v4export
