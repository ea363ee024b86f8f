"""`make demo`: the finished projects that `lora-tui --demo` opens, made and packed into the
program.
"""
