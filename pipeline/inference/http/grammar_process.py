"""Compiles a grammar in a process of its own, with limited time, memory and stack.

Clients write grammars. Some take the library minutes, or overflow its stack, which would end the
server.
"""

import sys

from pipeline.files.worker import limit, limit_memory


def main() -> None:
    """Compile the grammar of stdin, and print what is wrong with it."""
    from llguidance import LLMatcher

    limit("RLIMIT_CORE", 0)
    # half of a thread's: what fits here does not overflow in the server
    limit("RLIMIT_STACK", 2**22)
    limit("RLIMIT_CPU", 2)  # seconds
    limit_memory(512 * 2**20)
    print(LLMatcher.validate_grammar(sys.stdin.read()), end="")


if __name__ == "__main__":
    main()
